"""A cache written twice is the same; one stopped and repeated too; one made otherwise is kept."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from tiny_cache import FEW, SETTINGS, contents, refusal, write
from tiny_pair import SHAPE, lively

from sae_steer.cache import ActivationCache, writing
from sae_steer.errors import InputError, StaleError, SteerError
from sae_steer.model import rows
from sae_steer.pair.model_pair import NamedModel
from sae_steer.pair.texts import GeneratedTexts, TextFile
from sae_steer.records import write_json
from sae_steer.settings import CorpusSettings


def test_written_twice_the_files_are_the_same(tiny, whole, tmp_path):
    write(tiny, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_bytes_do_not_depend_on_how_many_threads_share_the_batches(tiny, tmp_path, precision, monkeypatch):
    settings = replace(SETTINGS, precision=precision, tokens_per_batch=300)
    right, threads = rows.pad, torch.get_num_threads()

    def cached(count: int) -> dict[str, bytes]:
        meet, seen = threading.Barrier(count), set()

        def pad(*arguments):
            if (name := threading.current_thread().name) not in seen:
                seen.add(name)
                meet.wait(30)  # as many threads as wanted run at once, or this breaks
            return right(*arguments)

        monkeypatch.setattr(rows, "pad", pad)
        torch.set_num_threads(count)
        write(tiny, tmp_path / str(count), settings=settings)
        return contents(tmp_path / str(count))

    try:
        assert cached(1) == cached(2)
    finally:
        torch.set_num_threads(threads)


def test_a_finished_cache_is_reused(tiny, mine):
    before = {path.name: path.stat().st_mtime_ns for path in mine.iterdir()}
    write(tiny, mine, on_rows=lambda *told: pytest.fail("rows were written"))
    assert {path.name: path.stat().st_mtime_ns for path in mine.iterdir()} == before


def test_stopped_between_shards_and_repeated_equals_uninterrupted(tiny, whole, tmp_path):
    def stop(done: int, total: int, note: str = "") -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tiny, tmp_path / "mine", on_rows=stop)
    assert "only half written" in refusal(InputError, lambda: ActivationCache.open(tmp_path / "mine"))
    kept = contents(tmp_path / "mine")
    write(tiny, tmp_path / "mine")
    assert contents(tmp_path / "mine") == contents(whole)
    assert all(contents(whole)[name] == content for name, content in kept.items() if name.endswith(".h5"))


def test_a_finished_shard_that_was_cut_since_is_written_anew(tiny, whole, tmp_path):
    def stop(*told) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tiny, tmp_path / "mine", on_rows=stop)
    (tmp_path / "mine" / "shard-00000.h5").write_bytes(b"cut")
    write(tiny, tmp_path / "mine")
    assert contents(tmp_path / "mine") == contents(whole)


def test_a_missing_shard_of_a_finished_cache_alone_is_written_anew(tiny, whole, mine):
    (mine / "shard-00001.h5").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in mine.glob("*.h5")}
    write(tiny, mine)
    assert contents(mine) == contents(whole)
    assert all((mine / name).stat().st_mtime_ns == moment for name, moment in before.items())


def test_the_models_run_over_the_next_texts_while_a_shard_is_written(tiny, whole, tmp_path, monkeypatch):
    streams, write_shard, next_began = writing._streams, writing.write_shard, threading.Event()
    last = f"shard-{len(list(whole.glob('*.h5'))) - 1:05d}.h5"

    def begin(*arguments):
        next_began.set()
        return streams(*arguments)

    def wait_for_the_next(folder, shard, streams, **rest):
        assert shard.file == last or next_began.wait(30), "the next forward waits for this write"
        write_shard(folder, shard, streams, **rest)
        next_began.clear()

    monkeypatch.setattr(writing, "_streams", begin)
    monkeypatch.setattr(writing, "write_shard", wait_for_the_next)
    write(tiny, tmp_path / "mine")
    assert contents(tmp_path / "mine") == contents(whole)


# Other settings, other writers


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": (1,)}, "layers: "),
        ({"settings": replace(SETTINGS, dtype="float32")}, 'dtype: "float16", now "float32"'),
        ({"source": GeneratedTexts(replace(FEW, seed=1))}, "texts: "),
        ({"source": GeneratedTexts(FEW, variants=("adhd",))}, "texts: "),
    ],
    ids=["layers", "dtype", "texts", "variants"],
)
def test_a_cache_made_otherwise_is_refused_and_kept(tiny, mine, change, told):
    before = contents(mine)
    assert told in refusal(StaleError, lambda: write(tiny, mine, **change))
    assert contents(mine) == before


def test_a_half_written_cache_made_otherwise_is_refused_and_kept(tiny, mine):
    manifest = json.loads((mine / "manifest.json").read_text())
    write_json(mine / "manifest.json", {**manifest, "complete": False})
    before = contents(mine)
    refusal(StaleError, lambda: write(tiny, mine, layers=(1,)))
    assert contents(mine) == before


def test_force_replaces_and_leaves_no_shard_of_the_old_cache(tiny, whole, mine):
    write(tiny, mine, source=GeneratedTexts(replace(FEW, train_plans=2)), force=True)
    listed = {shard["file"] for shard in ActivationCache.open(mine).manifest["shards"]}
    assert {path.name for path in mine.glob("*.h5")} == listed
    write(tiny, mine, force=True)
    assert contents(mine) == contents(whole)


def test_a_forced_rewrite_that_is_stopped_never_passes_for_the_old_cache(tiny, whole, mine, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    streams, calls = writing._streams, iter(range(100))
    monkeypatch.setattr(writing, "_streams", lambda *a: streams(*a) if next(calls) < 2 else stop())
    with pytest.raises(KeyboardInterrupt):
        write(tiny, mine, layers=(1,), force=True)
    monkeypatch.undo()
    assert "only half written" in refusal(InputError, lambda: ActivationCache.open(mine))
    write(tiny, mine, force=True)
    assert contents(mine) == contents(whole)


def test_a_forced_rewrite_with_bad_input_destroys_nothing(tiny, mine, tmp_path):
    before = contents(mine)
    words = tmp_path / "words.txt"
    words.write_text("no step anywhere\n")
    refusal(InputError, lambda: write(tiny, mine, source=TextFile.read(words), force=True))
    refusal(InputError, lambda: write(tiny, mine, layers=(9,), force=True))
    assert contents(mine) == before


def test_a_second_writer_is_refused_while_the_first_one_writes(tiny, whole, tmp_path):
    told = []

    def write_too(done: int, total: int, note: str = "") -> None:
        if not told:
            told.append("")
            other = threading.Thread(
                target=lambda: told.append(refusal(SteerError, lambda: write(tiny, tmp_path / "mine")))
            )
            other.start()
            other.join()

    write(tiny, tmp_path / "mine", on_rows=write_too)
    assert "another process is writing" in told[1]
    assert contents(tmp_path / "mine") == contents(whole)


# Requests that make no sense


def test_requests_that_make_no_sense_are_refused_before_anything_is_written(tiny, tmp_path):
    out = tmp_path / "mine"
    assert "no layer 3" in refusal(InputError, lambda: write(tiny, out, layers=(3,)))
    assert "name one with --layer" in refusal(InputError, lambda: write(tiny, out, layers=()))
    settings = replace(SETTINGS, dtype="int8")
    assert "'int8'; choose float16, bfloat16, float32 or auto" in refusal(
        InputError, lambda: write(tiny, out, settings=settings)
    )
    odd = replace(tiny, target=NamedModel("moments", tiny.target.model))
    assert "cannot be called 'moments'" in refusal(InputError, lambda: write(odd, out))
    assert not out.exists()
    none = CorpusSettings(train_plans=0, scan_plans=0, tune_plans=0, confirm_plans=0)
    assert "no texts to cache" in refusal(InputError, lambda: write(tiny, out, source=GeneratedTexts(none)))


def test_the_same_layers_in_another_order_are_the_same_cache(tiny, whole):
    assert write(tiny, whole, layers=[2, 0, 2]).layers == (0, 2)


def test_models_of_different_width_share_a_cache(tiny, tmp_path):
    odd = replace(tiny, reference=NamedModel("standard", lively(replace(SHAPE, d_model=16), 5)))
    cache = write(odd, tmp_path / "mine")
    assert (cache.rows("standard", 2, "scan").d_in, cache.rows("adhd", 2, "scan").d_in) == (16, 32)
    assert cache.rows("standard", 2, "scan").n_rows == cache.rows("adhd", 2, "scan").n_rows
