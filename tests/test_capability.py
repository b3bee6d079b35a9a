import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_steer.capability import Capability, assumed, capability, decide
from sae_steer.errors import InputError, StaleError

AMX = Capability(frozenset({"avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}))
ZEN4 = Capability(frozenset({"avx2", "avx512", "avx512_vnni", "avx512_bf16"}))
SKYLAKE = Capability(frozenset({"avx2", "avx512"}))
LAPTOP = Capability(frozenset({"avx2", "avx_vnni"}))
HASWELL = Capability(frozenset({"avx2"}))
GRAVITON = Capability(frozenset({"neon", "arm_dot", "arm_i8mm", "arm_bf16"}))
APPLE = Capability(frozenset({"neon", "arm_dot"}), system="Darwin")
A100, T4 = Capability(frozenset({"avx2"}), cuda=(8, 0)), Capability(frozenset({"avx512_bf16"}), cuda=(7, 5))


@pytest.mark.parametrize(
    ("machine", "device", "precision", "where"),
    [
        (AMX, "cpu", "bfloat16", "AMX"),
        (ZEN4, "cpu", "bfloat16", "AVX512-BF16"),
        (SKYLAKE, "cpu", "float32", "AVX-512"),
        (LAPTOP, "cpu", "float32", "AVX2-VNNI"),
        (HASWELL, "cpu", "float32", "AVX2"),
        (GRAVITON, "cpu", "bfloat16", "ARM BF16"),
        (APPLE, "cpu", "float32", "NEON"),
        (APPLE, "mps", "float32", "mps"),
        (A100, "cuda", "bfloat16", "compute capability 8.0"),
        (T4, "cuda", "float32", "compute capability 7.5"),
        (T4, "cpu", "bfloat16", "AVX512-BF16"),
    ],
)
def test_auto_takes_what_the_device_computes_natively_and_says_so(machine, device, precision, where):
    with assumed(machine):
        decision = decide("auto", device)
    assert decision.precision == precision
    assert decision.line == f"precision {precision}, by what this machine has ({where})"


def test_bfloat16_asked_where_it_is_emulated_says_what_it_costs():
    with assumed(HASWELL):
        slow, fast = decide("bfloat16", "cpu"), decide("float32", "cpu")
    assert slow.precision == "bfloat16"
    assert slow.line.endswith("bfloat16 is emulated here, its products take 7 to 100 times as long as float32's")
    assert fast.line == "precision float32, as asked (AVX2)"
    with assumed(AMX):
        assert "emulated" not in decide("bfloat16", "cpu").line


def test_what_was_begun_is_finished_at_its_precision():
    with assumed(HASWELL):
        finished = decide("auto", "cpu", begun="bfloat16", what="the cache in X")
    assert finished.precision == "bfloat16"
    assert "as the cache in X was begun (AVX2); bfloat16 is emulated here" in finished.line
    with assumed(AMX):
        assert decide("auto", "cpu", begun="float32").precision == "float32"


def test_another_precision_than_what_was_begun_is_refused_in_a_line():
    with pytest.raises(StaleError, match="the cache in X was begun at bfloat16, and --precision float32 was asked"):
        decide("float32", "cpu", begun="bfloat16", what="the cache in X")


def test_a_precision_that_is_none_is_refused():
    with pytest.raises(InputError, match="no precision 'float16'; choose auto, float32 or bfloat16"):
        decide("float16", "cpu")


@pytest.mark.parametrize(
    ("machine", "fast"),
    [(AMX, True), (ZEN4, True), (SKYLAKE, False), (LAPTOP, True), (HASWELL, False), (GRAVITON, True), (APPLE, False)],
)
def test_int8_is_fast_where_four_of_its_products_are_one_instruction(machine, fast):
    assert machine.int8 is fast


def test_an_assumed_machine_is_gone_after_the_block():
    before = capability()
    with pytest.raises(InputError), assumed(HASWELL):
        decide("float16", "cpu")
    assert capability() is before


READ = """
import json
from sae_steer.capability import capability
here = capability()
print(json.dumps([here.isa, here.bfloat16, here.int8, here.processor]))
"""


def _read_with(**limits: str) -> list:
    asked = subprocess.run(
        [sys.executable, "-c", READ], env=os.environ | limits, capture_output=True, text=True, check=True
    )
    return json.loads(asked.stdout)


@pytest.mark.skipif("avx2" not in capability().instructions, reason="the variables limit x86 processors")
def test_the_variables_of_the_test_mode_make_any_x86_processor_one_with_avx2_alone():
    isa, bfloat16, int8, processor = _read_with(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert (isa, bfloat16, int8) == ("avx2", False, False)
    assert processor == capability().processor


SCRIPT = """
import json, sys
sys.path.insert(0, {benchmarks!r})
from isa import as_asked, machine, record_path
as_asked()
print(json.dumps([machine(), record_path(__file__).name, sys.argv[1:]]))
"""


@pytest.mark.skipif("avx2" not in capability().instructions, reason="the variables limit x86 processors")
@pytest.mark.parametrize(
    ("asked", "isa", "record"), [("native", None, "speed.json"), ("avx2", "avx2", "speed_avx2.json")]
)
def test_a_benchmark_starts_anew_on_the_instruction_set_it_is_asked_for(asked, isa, record, tmp_path):
    script = tmp_path / "speed.py"
    script.write_text(SCRIPT.format(benchmarks=str(Path(__file__).parents[1] / "experiments" / "benchmarks")))
    run = subprocess.run(
        [sys.executable, script, "--isa", asked, "--rows", "3"], capture_output=True, text=True, check=True
    )
    machine, name, rest = json.loads(run.stdout)
    assert (machine["isa"], machine["instructions"]) == (asked, isa or capability().isa)
    assert machine["processor"] == capability().processor
    assert (name, rest) == (record, ["--rows", "3"])
