"""A cache begun on one machine and resumed on another is the first's to the byte, or refused in a line."""

from dataclasses import replace

import pytest
from tiny_cache import SETTINGS, contents, refusal, write

from sae_steer.cache import ActivationCache, begun_precision
from sae_steer.capability import Capability, assumed
from sae_steer.errors import StaleError
from sae_steer.records import read_json, write_json

AUTO = replace(SETTINGS, precision="auto")
AMX = Capability(frozenset({"avx2", "avx512", "avx512_bf16", "amx_bf16"}), "an AMX machine")
SKYLAKE = Capability(frozenset({"avx2", "avx512"}), "an AVX-512 machine")
HASWELL = Capability(frozenset({"avx2"}), "an AVX2 machine")


def _begin(tiny, out, machine: Capability) -> None:
    def stop(*told) -> None:
        raise KeyboardInterrupt

    with assumed(machine), pytest.raises(KeyboardInterrupt):
        write(tiny, out, settings=AUTO, on_rows=stop)
    assert len(list(out.glob("*.h5"))) >= 1


@pytest.mark.parametrize(("machine", "precision"), [(AMX, "bfloat16"), (SKYLAKE, "float32"), (HASWELL, "float32")])
def test_auto_takes_the_machines_own_precision_and_the_manifest_says_so(tiny, tmp_path, machine, precision):
    with assumed(machine):
        manifest = write(tiny, tmp_path / "auto", settings=AUTO).manifest
        write(tiny, tmp_path / "asked", settings=replace(AUTO, precision=precision))
    assert manifest["provenance"]["settings"]["precision"] == manifest["computed"]["precision"] == precision
    assert manifest["computed"]["processor"] == machine.processor
    assert contents(tmp_path / "auto") == contents(tmp_path / "asked")


def test_a_finished_cache_is_found_again_on_any_machine(tiny, tmp_path):
    with assumed(AMX):
        write(tiny, tmp_path / "mine", settings=AUTO)
    before = contents(tmp_path / "mine")
    with assumed(HASWELL):
        write(tiny, tmp_path / "mine", settings=AUTO, on_rows=lambda *told: pytest.fail("rows were written"))
    assert contents(tmp_path / "mine") == before


def test_stopped_and_resumed_where_float32_products_are_the_same_it_stays_float32(tiny, tmp_path):
    _begin(tiny, tmp_path / "mine", SKYLAKE)
    with assumed(SKYLAKE):
        write(tiny, tmp_path / "whole", settings=AUTO)
    with assumed(AMX):  # alone it would take bfloat16
        write(tiny, tmp_path / "mine", settings=AUTO)
    assert contents(tmp_path / "mine") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("first", "second"), [(AMX, HASWELL), (HASWELL, AMX), (SKYLAKE, HASWELL)])
def test_stopped_and_resumed_where_products_differ_it_is_refused_and_kept(tiny, tmp_path, first, second):
    _begin(tiny, tmp_path / "mine", first)
    before = contents(tmp_path / "mine")
    with assumed(second):
        line = refusal(StaleError, lambda: write(tiny, tmp_path / "mine", settings=AUTO))
    assert "differ in their last bits; finish it on a machine like the first" in line
    assert contents(tmp_path / "mine") == before
    with assumed(second):
        assert write(tiny, tmp_path / "mine", settings=AUTO, force=True).manifest["complete"]


def test_another_precision_than_it_was_begun_at_is_refused(tiny, mine):
    line = refusal(StaleError, lambda: write(tiny, mine, settings=replace(SETTINGS, precision="bfloat16")))
    assert "was begun at float32, and --precision bfloat16 was asked" in line
    assert begun_precision(mine) == "float32"


def test_a_cache_of_before_that_does_not_name_its_machine_is_found_at_its_precision(tiny, mine):
    manifest = read_json(mine / "manifest.json")
    del manifest["computed"]
    write_json(mine / "manifest.json", manifest)
    with assumed(AMX):
        assert write(tiny, mine, settings=AUTO).manifest == manifest
    assert ActivationCache.open(mine).manifest == manifest
