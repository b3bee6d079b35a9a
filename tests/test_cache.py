"""The cache holds what the models compute, survives every kind of stop, and says what is wrong with it."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tiny_pair import SHAPE, lively, write_pair

from sae_steer.cache import LABELS, ActivationCache, cache_activations, site, writing
from sae_steer.cache.shuffle import Shuffle
from sae_steer.cache.storage import decoded, encoded, narrowest
from sae_steer.corpus import write_plans
from sae_steer.errors import InputError, NotFiniteError, StaleError, SteerError
from sae_steer.model.batching import length_batches
from sae_steer.model.decoder import Decoder
from sae_steer.pair.model_pair import ModelPair, NamedModel, load_pair
from sae_steer.pair.texts import GeneratedTexts, TextFile
from sae_steer.runtime import joined
from sae_steer.settings import SPLITS, CacheSettings, CorpusSettings

FEW = CorpusSettings(train_plans=16, scan_plans=8, tune_plans=4, confirm_plans=6)
SETTINGS = CacheSettings(rows_per_shard=600, tokens_per_batch=2_048, precision="float32")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pairs") / "tiny")


@pytest.fixture(scope="module")
def tiny(tiny_folder) -> ModelPair:
    return load_pair(tiny_folder)


def write(pair: ModelPair, out: Path, **changes) -> ActivationCache:
    wanted = {"layers": (0, 2), "settings": SETTINGS, "source": GeneratedTexts(FEW), **changes}
    return cache_activations(pair, out=out, **wanted)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """An uninterrupted cache; not to be spoilt."""
    return write(tiny, tmp_path_factory.mktemp("whole") / "cache").folder


@pytest.fixture
def mine(whole, tmp_path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "mine"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def refusal(kind: type[SteerError], act) -> str:
    with pytest.raises(kind) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# What is in it


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_the_models_own_streams_at_the_labelled_positions(pair, cache, split):
    texts = cache.texts(split)
    for model in pair.models:
        for layer in (1, 2):
            rows = torch.cat(list(cache.rows(model.name, layer, split).in_order()))
            assert len(rows) == sum(map(len, texts))
            for text, stored in islice(zip(texts, rows.split([len(text) for text in texts]), strict=True), 6):
                tokens = torch.from_numpy(text.token.astype(np.int64))[None]
                expected = model.decoder.resid_posts(tokens, (layer,))[layer][0]
                torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-3)


def test_float32_rows_are_exact_to_the_arithmetic(tiny, tmp_path):
    cache = write(tiny, tmp_path / "exact", settings=replace(SETTINGS, dtype="float32"))
    rows, text = next(cache.rows("adhd", 2, "scan").in_order()), cache.texts("scan")[0]
    expected = tiny.target.decoder.resid_posts(torch.from_numpy(text.token.astype(np.int64))[None], (2,))[2][0]
    torch.testing.assert_close(rows[: len(text)], expected, rtol=1e-5, atol=1e-5)


def test_labels_are_the_grammars(tiny, whole):
    cache, first = ActivationCache.open(whole), 0
    for split in SPLITS:
        count = getattr(FEW, f"{split}_plans")
        texts = cache.texts(split)
        assert len(texts) == 2 * count
        for variant in (0, 1):
            plans = write_plans(split, cache.variants[variant], count=count, seed=0)
            own = [text for text in texts if text.variant == variant]
            for plan, text in zip(plans, own, strict=True):
                assert (text.prompt, text.task, text.split) == (first + plan.prompt, plan.task.index, split)
                assert tiny.tokenizer.decode(text.token.tolist()) == plan.text
                assert text.step[text.is_onset].tolist() == list(range(len(plan.steps)))
                assert text.next_is_target[text.is_onset].tolist() == [step.is_target for step in plan.steps]
                np.testing.assert_allclose(text.true_p[text.is_onset], [step.true_p for step in plan.steps], rtol=1e-6)
        first += count


def test_positions_count_up_within_each_text(whole):
    labels = ActivationCache.open(whole).labels("train")
    assert set(labels) == set(LABELS)
    assert len({len(column) for column in labels.values()}) == 1
    step = np.diff(labels["position"])
    assert ((step == 1) | (labels["position"][1:] == 0)).all()


def test_no_task_is_in_two_splits_and_a_shard_is_of_one(whole):
    cache = ActivationCache.open(whole)
    tasks = [set(cache.labels(split)["task"].tolist()) for split in SPLITS]
    assert sum(map(len, tasks)) == len(set.union(*tasks))
    rows = {split: sum(s["rows"] for s in cache.manifest["shards"] if s["split"] == split) for split in SPLITS}
    assert rows == {split: len(cache.labels(split)["token"]) for split in SPLITS}
    assert all(shard["rows"] <= 600 or shard["texts"] == 1 for shard in cache.manifest["shards"])


def test_rows_do_not_depend_on_how_texts_were_cut_into_shards(tiny, whole, tmp_path):
    one = ActivationCache.open(whole)
    other = write(tiny, tmp_path / "cut", settings=replace(SETTINGS, rows_per_shard=2_500, tokens_per_batch=700))
    assert len(one.manifest["shards"]) > len(other.manifest["shards"])
    for name, column in one.labels("train").items():
        np.testing.assert_array_equal(column, other.labels("train")[name])
    rows = [torch.cat(list(cache.rows("adhd", 2, "train").in_order())) for cache in (one, other)]
    torch.testing.assert_close(*rows, rtol=2e-3, atol=2e-3)


def test_a_memory_map_reads_what_h5py_reads(whole):
    cache = ActivationCache.open(whole)
    for model in ("standard", "adhd"):
        rows = cache.rows(model, 2, "train")
        shards = [shard for shard in cache.manifest["shards"] if shard["split"] == "train"]
        assert len(shards) > 1
        for part, shard in zip(rows.maps, shards, strict=True):
            with h5py.File(whole / shard["file"]) as file:
                stored = file[f"{model}/{site(2)}"]
                assert stored.chunks is None
                assert stored.compression is None
                np.testing.assert_array_equal(part, stored[:])
                assert part.dtype == np.float16


def test_the_moments_are_numpys(whole):
    rows = ActivationCache.open(whole).rows("adhd", 2, "train")
    every = np.concatenate([part.astype(np.float64) for part in rows.maps])
    assert rows.n_rows == len(every)
    np.testing.assert_allclose(rows.mean.numpy(), every.mean(0), rtol=1e-6, atol=1e-6)
    assert rows.mean_square == pytest.approx(((every - every.mean(0)) ** 2).sum(1).mean(), rel=1e-9)


def test_rows_are_taken_by_number_across_shards(whole):
    rows = ActivationCache.open(whole).rows("adhd", 2, "train")
    every = torch.cat(list(rows.in_order(size=100)))
    chosen = np.array([0, 5, 599, 600, 601, rows.n_rows - 1])
    assert torch.equal(rows.take(chosen), every[chosen])


def test_own_renderings_are_those_of_a_models_name(whole):
    cache = ActivationCache.open(whole)
    assert (cache.own_variants("standard"), cache.own_variants("adhd"), cache.own_variants("base")) == (
        (0,), (1,), (0, 1),
    )  # fmt: skip
    assert {text.variant for text in cache.own_texts("scan", "adhd")} == {1}


# Shuffled batches


def test_a_batch_is_a_pure_function_of_its_step_and_seed(whole):
    one, other = (ActivationCache.open(whole).rows("adhd", 2, "train") for _ in range(2))
    forward = [one.batch(step, 64, 0) for step in range(200)]
    backward = [other.batch(step, 64, 0) for step in reversed(range(200))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(one.batch(0, 64, 0), one.batch(0, 64, 1))


def test_an_epoch_reads_every_whole_block_once_and_the_next_one_in_another_order(whole):
    rows = ActivationCache.open(whole).rows("standard", 0, "train")
    blocks = sum(len(part) // 16 for part in rows.maps)
    expected = sorted(
        part[start : start + 16].astype(np.float32).tobytes()
        for part in rows.maps
        for start in range(0, len(part) - 15, 16)
    )
    epochs = [
        [rows.batch(epoch * blocks + step, 16, 3).numpy().tobytes() for step in range(blocks)] for epoch in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]


def test_larger_batches_are_made_of_the_same_blocks_at_most_once_an_epoch(whole):
    rows = ActivationCache.open(whole).rows("standard", 0, "train")
    per_epoch = sum(len(part) // 16 for part in rows.maps) // 10
    drawn = [block for step in range(per_epoch) for block in rows.batch(step, 160, 3).split(16)]
    assert len({block.numpy().tobytes() for block in drawn}) == len(drawn) == 10 * per_epoch


@pytest.mark.parametrize("n", [1, 2, 3, 16, 1000, 4097])
def test_a_shuffle_is_a_permutation_that_its_key_fixes(n):
    orders = [Shuffle(n, key)(np.arange(n)) for key in (5, 5, 6)]
    assert all(sorted(order.tolist()) == list(range(n)) for order in orders)
    np.testing.assert_array_equal(orders[0], orders[1])
    assert n < 16 or (orders[0] != orders[2]).mean() > 0.8


def test_a_shuffle_spreads_neighbours_like_a_random_order():
    n = 10_000
    places = Shuffle(n, 3)(np.arange(n))
    assert abs(np.corrcoef(np.arange(n), places)[0, 1]) < 4 / n**0.5
    assert np.abs(np.diff(places)).mean() == pytest.approx(n / 3, rel=0.05)
    counts = np.histogram2d(np.arange(n), places, bins=10)[0]
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 81 + 4 * (2 * 81) ** 0.5


@pytest.mark.parametrize("size", [0, 8, 100, 16 * 10**6])
def test_a_batch_size_that_cannot_be_cut_is_refused(whole, size):
    rows = ActivationCache.open(whole).rows("adhd", 2, "train")
    with pytest.raises(InputError, match=f"a batch of {size} rows"):
        rows.batch(0, size, 0)


def test_batches_of_like_length_hold_every_text_once():
    lengths = torch.randint(1, 60, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(length_batches(lengths, 200))
    assert sorted(chain.from_iterable(batches)) == list(range(100))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 200 for batch in batches)
    assert list(length_batches([], 200)) == []
    assert list(length_batches([500, 3], 200)) == [[1], [0]]


# Same inputs, same bytes; stopped and repeated, the same bytes


def test_written_twice_the_files_are_the_same(tiny, whole, tmp_path):
    write(tiny, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)


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


WRITER = """
import os, sys, time
import torch
from sae_steer.cache import cache_activations, writing
from sae_steer.errors import SteerError
from sae_steer.pair.model_pair import load_pair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.runtime import joined
from sae_steer.settings import CacheSettings, CorpusSettings

def write(out, rank, size, port):
    os.environ |= {{"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank}}
    os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}}
    torch.set_num_threads({threads})
    streams = writing._streams
    writing._streams = lambda *arguments: (time.sleep(0.03), streams(*arguments))[1]
    try:
        with joined(device="cpu") as world:
            cache_activations(load_pair({pair!r}), out=out, layers=(0, 2), settings={settings!r},
                              source=GeneratedTexts({few!r}), world=world)
    except SteerError:
        os._exit(3)
    os._exit(0)

for line in sys.stdin:  # children for every folder named; nothing has run in torch yet, so a fork is safe
    out, size, port = line.split()
    children = []
    for rank in range(int(size)):
        children.append(os.fork())
        if not children[-1]:
            write(out, str(rank), size, port)
    print(*children, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


class Writers:
    """A process that writes caches in children of its own, one or several a cache."""

    def __init__(self, pair: Path) -> None:
        script = WRITER.format(threads=torch.get_num_threads(), pair=str(pair), settings=SETTINGS, few=FEW)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(Path(writing.__file__).parents[2])},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def start(self, out: Path, size: int) -> list[int]:
        """The ids of `size` processes that begin to write `out`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.process.stdin.write(f"{out} {size} {free.getsockname()[1]}\n")
        return self._numbers()

    def ended(self) -> list[int]:
        """Their exit codes, when all have ended."""
        return self._numbers()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def _numbers(self) -> list[int]:
        return [int(number) for number in self.process.stdout.readline().split()]


@pytest.fixture(scope="module")
def writers(tiny_folder):
    started = Writers(tiny_folder)
    yield started
    started.close()


def kill(process: int, out: Path, after: float) -> None:
    """Kill it `after` seconds from when the first shard is there."""
    deadline = time.monotonic() + 30
    while not (out / "shard-00000.h5").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)


def finished(out: Path) -> bool:
    manifest = out / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text())["complete"]


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_any_moment_then_again_equals_uninterrupted(tiny, whole, tmp_path, writers, seed):
    out = tmp_path / "mine"
    (process,) = writers.start(out, 1)
    kill(process, out, random.Random(seed).uniform(0, 0.5))
    assert writers.ended() == [-signal.SIGKILL]
    assert not finished(out), "killed too late to say anything"
    write(tiny, out)
    assert contents(out) == contents(whole)


def test_two_processes_write_the_bytes_of_one(whole, tmp_path, writers):
    writers.start(tmp_path / "mine", 2)
    assert writers.ended() == [0, 0]
    assert contents(tmp_path / "mine") == contents(whole)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_of_two_processes_ends_the_other_and_leaves_what_resumes(
    tiny, whole, tmp_path, writers, victim
):
    out = tmp_path / "mine"
    kill(writers.start(out, 2)[victim], out, 0.05)
    assert writers.ended()[victim] == -signal.SIGKILL
    assert not finished(out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5") if path.with_suffix(".json").exists()}
    assert kept
    write(tiny, out)
    assert contents(out) == contents(whole)
    assert all((out / name).stat().st_mtime_ns == moment for name, moment in kept.items())


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


def test_sigterm_ends_in_one_line_and_the_same_command_goes_on(tiny, whole, tmp_path):
    def stop(done: int, total: int, note: str = "") -> None:
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def write_told() -> None:
        with joined(device="cpu") as world:
            write(tiny, tmp_path / "mine", on_rows=stop, world=world)

    assert refusal(SteerError, write_told).startswith("told to stop; what is finished is kept")
    assert list((tmp_path / "mine").glob("shard-*.json"))
    write(tiny, tmp_path / "mine")
    assert contents(tmp_path / "mine") == contents(whole)


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
    (mine / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
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
            told.append(refusal(SteerError, lambda: write(tiny, tmp_path / "mine")))

    write(tiny, tmp_path / "mine", on_rows=write_too)
    assert "another process is writing" in told[0]
    assert contents(tmp_path / "mine") == contents(whole)


# Damage


def test_a_missing_or_cut_shard_is_named(mine):
    path = mine / "shard-00001.h5"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is missing or cut short" in refusal(InputError, lambda: ActivationCache.open(mine))
    path.unlink()
    assert f"{path} is missing or cut short" in refusal(InputError, lambda: ActivationCache.open(mine))


def test_a_flipped_bit_is_found_by_its_checksum_and_named(mine):
    assert ActivationCache.open(mine).verify() == []
    path = mine / "shard-00001.h5"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)
    (wrong,) = ActivationCache.open(mine).verify()
    assert str(path) in wrong


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory) -> Path:
    """A cache of the same texts from another target model; not to be spoilt."""
    changed = replace(tiny, target=NamedModel("adhd", lively(SHAPE, 9)))
    return write(changed, tmp_path_factory.mktemp("other") / "cache").folder


def test_a_shard_of_another_cache_is_named_as_one(mine, other):
    path = Path(shutil.copy(other / "shard-00001.h5", mine))
    cache = ActivationCache.open(mine)
    (wrong,) = cache.verify()
    assert wrong.startswith(f"{path} is a shard of another cache")
    assert "adhd: " in wrong
    assert f"{path} is a shard of another cache" in refusal(InputError, lambda: cache.rows("adhd", 2, "train"))


def test_a_shard_in_the_place_of_another_is_named(mine):
    manifest = json.loads((mine / "manifest.json").read_text())
    first, second, *_ = manifest["shards"]
    shutil.copy(mine / first["file"], mine / second["file"])
    second |= {"bytes": first["bytes"], "sha256": first["sha256"]}
    (mine / "manifest.json").write_text(json.dumps(manifest))
    (wrong,) = ActivationCache.open(mine).verify()
    assert f"{mine / second['file']} is a shard of another cache, or of another place in this one (file: " in wrong


@pytest.mark.parametrize(("part", "named"), [("models", "adhd"), ("tokenizer", "tokenizer")])
def test_a_manifest_of_another_model_or_tokenizer_is_found(mine, other, part, named):
    manifest = json.loads((mine / "manifest.json").read_text())
    changed = json.loads((other / "manifest.json").read_text())["models"] if part == "models" else "0" * 64
    (mine / "manifest.json").write_text(json.dumps({**manifest, part: changed}))
    wrong = ActivationCache.open(mine).verify()
    assert len(wrong) == len(manifest["shards"])
    assert all(f"({named}: " in line for line in wrong)


def test_the_pair_a_cache_was_not_written_from_is_told_what_differs(tiny, mine, other):
    assert "(another model 'adhd');" in refusal(InputError, lambda: ActivationCache.open(other).check_pair(tiny))
    longer = replace(tiny, context=256)
    assert "(another onset rule, target or context);" in refusal(
        InputError, lambda: ActivationCache.open(mine).check_pair(longer)
    )


@pytest.mark.parametrize("damage", [slice(0, 8), slice(0, 4_000)])
def test_a_shard_that_is_no_hdf5_any_more_is_named(mine, damage):
    path = mine / "shard-00000.h5"
    content = bytearray(path.read_bytes())
    content[damage] = bytes(len(content[damage]))
    path.write_bytes(content)
    cache = ActivationCache.open(mine)
    assert f"{path} is damaged" in refusal(InputError, lambda: cache.rows("adhd", 2, "train"))
    assert f"{path} is damaged" in refusal(InputError, lambda: cache.labels("train"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 0}'])
def test_a_manifest_that_is_none_is_named(mine, content):
    (mine / "manifest.json").write_text(content)
    assert str(mine / "manifest.json") in refusal(InputError, lambda: ActivationCache.open(mine))


def test_a_folder_without_a_cache_says_how_to_make_one(tmp_path):
    assert "sae-steer cache" in refusal(InputError, lambda: ActivationCache.open(tmp_path))


def test_what_a_cache_does_not_hold_is_named(whole, pair, tiny):
    cache = ActivationCache.open(whole)
    assert "holds layers 0, 2, not 1" in refusal(InputError, lambda: cache.rows("adhd", 1, "train"))
    assert "standard and adhd, not 'base'" in refusal(InputError, lambda: cache.rows("base", 2, "train"))
    assert "no 'test' rows" in refusal(InputError, lambda: cache.rows("adhd", 2, "test"))
    cache.check_pair(tiny)
    assert "from another pair than 'small'" in refusal(InputError, lambda: cache.check_pair(pair))


# Values that cannot be stored


def spoilt(pair: ModelPair, value: float) -> ModelPair:
    """The pair, its target with an embedding that blows up at the token "x"."""
    decoder = Decoder(pair.target.decoder.shape)
    decoder.load_state_dict(pair.target.decoder.state_dict())
    decoder.eval().requires_grad_(False)
    decoder.embed_tokens.weight[pair.tokenizer.encode("x")[0]] = value
    return replace(pair, target=NamedModel("adhd", decoder))


@pytest.fixture
def with_x(tmp_path) -> TextFile:
    """Texts of which one has an x, at position 6 of prompt 1."""
    path = tmp_path / "plans.jsonl"
    plans = ["<|task|>a<|steps|>b<|sep|><|end|>", "<|task|>a<|steps|>b<|sep|>bx<|sep|><|end|>"]
    path.write_text("\n".join(json.dumps({"text": plan, "task": "one"}) for plan in plans))
    return TextFile.read(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (1e5, "float16", "has a value float16 cannot hold"),
        (float("nan"), "float16", "has a value that is not finite"),
        (float("nan"), "bfloat16", "has a value that is not finite"),
        (float("inf"), "float32", "has a value that is not finite"),
        (float("nan"), "auto", "has a value that is not finite"),
    ],
)
def test_a_value_that_cannot_be_stored_is_named_with_its_place(tiny, with_x, tmp_path, value, dtype, told):
    settings = replace(SETTINGS, dtype=dtype)
    broken = spoilt(tiny, value)
    ids = tiny.tokenizer.encode(with_x.lines[1].text)
    position = ids.index(tiny.tokenizer.encode("x")[0]) if value == 1e5 else 0  # attention spreads a NaN: 0 * NaN
    line = refusal(
        NotFiniteError, lambda: write(broken, tmp_path / "mine", layers=(0,), settings=settings, source=with_x)
    )
    assert f"model 'adhd' {told} after block 0, prompt 1, position {position}" in line
    assert ("use --dtype bfloat16" in line) == (value == 1e5)
    assert not list((tmp_path / "mine").glob("*.h5"))
    repaired = write(tiny, tmp_path / "mine", layers=(0,), settings=settings, source=with_x)
    assert repaired.verify() == []


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "bfloat16")])
def test_a_value_too_large_for_float16_is_kept_in_a_wider_type(tiny, with_x, tmp_path, dtype, stored):
    settings = replace(SETTINGS, dtype=dtype)
    cache = write(spoilt(tiny, 1e5), tmp_path / "mine", layers=(0,), settings=settings, source=with_x)
    (split,) = {shard["split"] for shard in cache.manifest["shards"]}
    assert cache.manifest["dtype"] == stored
    assert max(float(rows.max()) for rows in cache.rows("adhd", 0, split).in_order()) > 9e4


def test_auto_keeps_float16_where_it_fits_and_decides_alike_on_resuming(tiny, tmp_path):
    auto = write(tiny, tmp_path / "auto", settings=replace(SETTINGS, dtype="auto"))
    assert auto.manifest["dtype"] == "float16"
    assert auto.manifest["provenance"]["settings"]["dtype"] == "auto"
    (auto.folder / "shard-00001.h5").unlink()
    before = auto.manifest
    assert write(tiny, tmp_path / "auto", settings=replace(SETTINGS, dtype="auto")).manifest == before


def test_a_value_beyond_what_auto_chose_says_which_type_to_use(tiny, with_x, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "TRIED", 1)  # only the first text, which has no x
    settings = replace(SETTINGS, dtype="auto")
    line = refusal(
        NotFiniteError,
        lambda: write(spoilt(tiny, 1e5), tmp_path / "mine", layers=(0,), settings=settings, source=with_x),
    )
    assert "float16 cannot hold after block 0, prompt 1" in line
    assert "use --dtype bfloat16" in line


def test_bfloat16_rows_are_the_float32_rows_rounded(tiny, tmp_path):
    kept, exact = (
        write(tiny, tmp_path / dtype, settings=replace(SETTINGS, dtype=dtype)).rows("adhd", 2, "train")
        for dtype in ("bfloat16", "float32")
    )
    for read in (
        lambda rows: torch.cat(list(rows.in_order())),
        lambda rows: rows.take(np.array([0, 5, rows.n_rows - 1])),
        lambda rows: rows.batch(1, 64, 3),
    ):
        assert torch.equal(read(kept), read(exact).bfloat16().float())
    torch.testing.assert_close(kept.mean, torch.cat(list(kept.in_order())).mean(0), rtol=1e-4, atol=1e-5)


def test_stored_and_read_back_a_row_is_its_rounding(tmp_path):
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 5)
    for dtype in ("float16", "bfloat16", "float32"):
        expected = rows.to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(decoded(encoded(rows.numpy(), dtype)), expected)


@pytest.mark.parametrize(
    ("scale", "type_"), [(1.0, "float16"), (7e3, "float16"), (9e3, "bfloat16"), (1e-7, "bfloat16")]
)
def test_auto_leaves_room_above_and_bits_below(scale, type_):
    assert narrowest([np.full((4, 4), scale, dtype=np.float32)]) == type_


# Folders that cannot be written


def test_a_file_that_may_not_grow_is_told_in_one_line_and_finished_shards_stay(tiny, whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(done: int, total: int, note: str = "") -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))

    try:
        told = refusal(SteerError, lambda: write(tiny, tmp_path / "mine", on_rows=limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large; free space" in told
    assert list((tmp_path / "mine").glob("shard-*.json"))
    assert not list((tmp_path / "mine").glob(".*.tmp"))
    write(tiny, tmp_path / "mine")
    assert contents(tmp_path / "mine") == contents(whole)


@pytest.fixture
def disk(tmp_path) -> Path:
    """A disk of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    ask = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(ask, capture_output=True, check=False).returncode:
        pytest.skip("needs leave to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk_is_refused_in_one_line(tiny, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    told = refusal(SteerError, lambda: write(tiny, disk / "mine"))
    assert told == f"cannot write {disk / 'mine'}: Read-only file system; name a writable folder with --out"


def test_a_folder_one_may_not_write_is_refused_in_one_line(tiny, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("no mode stops root")
    (tmp_path / "mine").mkdir(mode=0o500)
    assert "Permission denied; name a writable folder" in refusal(SteerError, lambda: write(tiny, tmp_path / "mine"))


def test_a_path_under_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(SteerError, lambda: write(tiny, tmp_path / "file" / "cache"))


def test_a_full_disk_is_told_in_one_line_and_finished_shards_stay(tiny, whole, disk):
    told = refusal(SteerError, lambda: write(tiny, disk / "mine"))
    assert "No space left on device; free space" in told
    kept = [path.name for path in sorted((disk / "mine").glob("*.h5"))]
    assert 0 < len(kept) < len(list(whole.glob("*.h5")))
    assert not list((disk / "mine").glob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    write(tiny, disk / "mine")
    assert contents(disk / "mine") == contents(whole)


# Requests that make no sense


def test_requests_that_make_no_sense_are_refused_before_anything_is_written(tiny, tmp_path):
    out = tmp_path / "mine"
    assert "no layer 3" in refusal(InputError, lambda: write(tiny, out, layers=(3,)))
    assert "name one with --layer" in refusal(InputError, lambda: write(tiny, out, layers=()))
    settings = replace(SETTINGS, dtype="int8")
    assert "'int8'; choose float16, bfloat16, float32 or auto" in refusal(
        InputError, lambda: write(tiny, out, settings=settings)
    )
    odd = replace(tiny, target=NamedModel("moments", tiny.target.decoder))
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
