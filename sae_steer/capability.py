"""What this machine computes natively, and at which precision a run's matrix products therefore run.

1. The instruction sets are read here and nowhere else: what the processor has, less what the variables of the test
   mode take away (`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`).
2. bfloat16 is chosen where a product of it is native: AMX, AVX512-BF16 or ARM BF16 reached through oneDNN; on a GPU
   from compute capability 8.0. Everywhere else, on Apple's GPUs too, it is float32.
3. Nothing is timed, so one machine always decides alike; what was begun at one precision is finished at it.
"""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from sae_steer.errors import InputError, StaleError
from sae_steer.settings import AUTO, PRECISIONS

Precision = Literal["float32", "bfloat16"]
NATIVE_GPU = (8, 0)
"""The compute capability from which a GPU has bfloat16 in its tensor cores."""

_BY_TORCH = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512_f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "neon",
    "dot": "arm_dot",
    "i8mm": "arm_i8mm",
    "bf16": "arm_bf16",
}
"""{what `torch.cpu.get_capabilities` calls it: what it is called here}"""
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "arm_bf16"}
_AVX512 = {"avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}
_TITLES = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "avx512_vnni": "AVX512-VNNI",
    "avx512": "AVX-512",
    "avx_vnni": "AVX2-VNNI",
    "avx2": "AVX2",
    "arm_bf16": "ARM BF16",
    "neon": "NEON",
}
"""From the widest down: the first that is in force names the machine in records and on the terminal."""
_WITHOUT = {
    "SSE41": {"avx2", "avx_vnni"} | _AVX512,
    "AVX": {"avx2", "avx_vnni"} | _AVX512,
    "AVX2": {"avx_vnni"} | _AVX512,
    "AVX2_VNNI": _AVX512,
    "AVX2_VNNI_2": _AVX512,
    "AVX512_CORE": _AVX512 - {"avx512"},
    "AVX512_CORE_VNNI": _AVX512 - {"avx512", "avx512_vnni"},
    "AVX512_CORE_BF16": {"amx_int8", "amx_bf16"},
    "AVX512_CORE_FP16": {"amx_int8", "amx_bf16"},
    "AVX10_1_512": {"amx_int8", "amx_bf16"},
}
"""{value of ONEDNN_MAX_CPU_ISA: what it takes away}; any other takes nothing."""


@dataclass(frozen=True)
class Capability:
    """The instruction sets in force on a machine, by the names of `_TITLES` and `arm_dot`, `arm_i8mm`, `amx_int8`."""

    instructions: frozenset[str]
    processor: str = "unknown processor"
    system: str = "Linux"
    """As `platform.system` says it: Linux, Darwin, Windows."""
    cuda: tuple[int, int] | None = None
    """The GPU's compute capability; None: torch is asked when a GPU is used."""

    @property
    def isa(self) -> str:
        """The widest instruction set in force, as records name it."""
        return next((name for name in _TITLES if name in self.instructions), "scalar")

    @property
    def title(self) -> str:
        """The same for people."""
        return _TITLES.get(self.isa, "no vectors known here")

    @property
    def bfloat16(self) -> bool:
        """Whether the processor multiplies matrices of bfloat16 natively; otherwise each entry is converted."""
        return bool(self.instructions & _BFLOAT16)

    @property
    def int8(self) -> bool:
        """Whether it sums four products of int8 in one instruction, exactly: without one, oneDNN's sums saturate."""
        return bool(self.instructions & {"avx512_vnni", "amx_int8", "arm_i8mm"}) or (
            "avx_vnni" in self.instructions and "avx512" not in self.instructions
        )

    def native(self, device: str) -> bool:
        """Whether products of bfloat16 are native on a device of this type: `cpu`, `cuda`, or another."""
        if device == "cuda":
            return (self.cuda or torch.cuda.get_device_capability()) >= NATIVE_GPU
        return device == "cpu" and self.bfloat16

    def where(self, device: str) -> str:
        """What stands behind the decision, for people: `AVX2`, `compute capability 7.5`, `mps`."""
        if device == "cuda":
            return "compute capability {}.{}".format(*(self.cuda or torch.cuda.get_device_capability()))
        return self.title if device == "cpu" else device

    def products(self, precision: str, device: str) -> str:
        """The instruction set behind a product: results agree to the last bit only between machines with the same."""
        if device == "cuda":
            return "sm_{}{}".format(*(self.cuda or torch.cuda.get_device_capability()))
        if device != "cpu":
            return device
        low = ("amx_bf16", "avx512_bf16", "arm_bf16") if precision == "bfloat16" else ()
        return next((name for name in (*low, "avx512", "avx2", "neon") if name in self.instructions), "scalar")

    def facts(self, precision: str, device: str = "cpu") -> dict[str, str]:
        """What a record says of the machine behind it."""
        processor = torch.cuda.get_device_name() if device == "cuda" and not self.cuda else self.processor
        return {
            "precision": precision,
            "device": device,
            "instructions": self.products(precision, device),
            "processor": processor,
        }


@dataclass(frozen=True)
class Decision:
    """At which precision a run's matrix products run, and the line that says so."""

    precision: Precision
    line: str


def decide(wanted: str, device: str, *, begun: str | None = None, what: str = "it") -> Decision:
    """The precision for `wanted`: a precision, or `auto`, which takes what was begun, else what is native.

    Args:
        device: its type, as `torch.device.type`.
        begun: the precision at which `what` was begun; an explicit other one is a `StaleError`.
        what: what was begun, in a user's words.
    """
    check_precision(wanted)
    if begun is not None and wanted not in (AUTO, begun):
        raise StaleError(
            f"{what} was begun at {begun}, and --precision {wanted} was asked; leave --precision out to finish it, "
            "choose another --out, or --force to begin anew"
        )
    here = capability()
    native, where = here.native(device), here.where(device)
    precision = begun or (wanted if wanted != AUTO else PRECISIONS[native])
    why = f"as {what} was begun" if begun else ("as asked" if wanted != AUTO else "by what this machine has")
    line = f"precision {precision}, {why} ({where})"
    if precision == "bfloat16" and not native:
        line += "; bfloat16 is emulated here, its products take 7 to 100 times as long as float32's"
    return Decision(precision, line)


def check_precision(wanted: str) -> None:
    """Raise `InputError` unless it is a precision or `auto`."""
    if wanted not in (AUTO, *PRECISIONS):
        raise InputError(f"no precision {wanted!r}; choose {AUTO}, {' or '.join(PRECISIONS)}")


def capability() -> Capability:
    """This machine's, or what a test or a measurement has assumed."""
    return _assumed[-1] if _assumed else _read()


_assumed: list[Capability] = []


@contextmanager
def assumed(other: Capability) -> Iterator[None]:
    """While the block runs, decisions are made as on a machine with `other`; what is computed does not change."""
    _assumed.append(other)
    try:
        yield
    finally:
        _assumed.pop()


@cache
def _read() -> Capability:
    report = torch.cpu.get_capabilities()
    has = {name for theirs, name in _BY_TORCH.items() if report.get(theirs)}
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    has -= _WITHOUT.get(limit.upper(), set())
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        has -= _AVX512
    if not _products_reach_bfloat16():
        has -= _BFLOAT16
    return Capability(frozenset(has), _processor(report), platform.system())


def _products_reach_bfloat16() -> bool:
    """Whether torch hands products of bfloat16 to oneDNN; on Apple's processors, for one, it does not."""
    operator = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and operator is not None and bool(operator())


def _processor(report) -> str:
    """The processor's name: Linux and macOS tell the marketed one, others a family."""
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines() if Path("/proc/cpuinfo").exists() else []
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if named:
            return named[0]
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or str(report.get("cpu_name") or "") or platform.machine()
