"""Figures of another instruction set than this machine's own: `--isa avx2` on any script here.

The script starts anew with the variables that keep torch, oneDNN, MKL, numba, numpy and OpenBLAS to AVX2, as on an
Intel laptop or an AMD processor before Zen 4; the record lies beside the native one and names both.
"""

import os
import sys
from pathlib import Path

from llvmlite import binding
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

ISAS = ("native", "avx2")
CHOSEN = "SAE_STEER_ISA"
"""The variable by which a process started here, and those it starts, know what was asked."""

_WIDER = ("avx512", "avx10", "avx-vnni", "avx_vnni", "avxvnni", "amx", "x86_v4", "avxneconvert", "avxifma", "evex512")


def limits(isa: str) -> dict[str, str]:
    """The variables that keep every library to `isa`, whatever the processor has beyond it."""
    if isa == "native":
        return {}
    return {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(
            f"+{name}"
            for name, there in sorted(binding.get_host_cpu_features().items())
            if there and not name.startswith(_WIDER)
        ),
        "NPY_DISABLE_CPU_FEATURES": " ".join(
            name for name in __cpu_dispatch__ if __cpu_features__[name] and name.lower().startswith(_WIDER)
        ),
    }


def as_asked() -> str:
    """Take `--isa` from the command line, and start this script anew if it is not the one in force; returns it."""
    asked = os.environ.get(CHOSEN, "native")
    if "--isa" in sys.argv:
        at = sys.argv.index("--isa")
        asked = (sys.argv[at + 1 : at + 2] or [""])[0]
        del sys.argv[at : at + 2]
    if asked not in ISAS:
        sys.exit(f"no instruction set {asked!r}; choose {' or '.join(ISAS)}")
    if os.environ.get(CHOSEN, "native") != asked:
        limited = {name: value for name, value in os.environ.items() if name not in limits("avx2")}
        os.execve(sys.executable, [sys.executable, *sys.argv], limited | {CHOSEN: asked} | limits(asked))
    return asked


def machine() -> dict:
    """What every record says of where its figures come from."""
    import torch

    from sae_steer.capability import capability

    here = capability()
    return {
        "isa": os.environ.get(CHOSEN, "native"),
        "instructions": here.isa,
        "processor": here.processor,
        "threads": torch.get_num_threads(),
    }


def record_path(script: str) -> Path:
    """`NAME.json` beside the script, `NAME_avx2.json` for figures of AVX2."""
    isa = os.environ.get(CHOSEN, "native")
    return Path(script).with_name(Path(script).stem + ("" if isa == "native" else f"_{isa}") + ".json")
