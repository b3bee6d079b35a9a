"""The cache holds what the models compute, and hands out its rows in order and shuffled."""

from dataclasses import replace
from itertools import chain, islice

import h5py
import numpy as np
import pytest
import torch
from tiny_cache import FEW, SETTINGS, write

from sae_steer.cache import LABELS, ActivationCache, site
from sae_steer.cache.shuffle import Shuffle
from sae_steer.corpus import write_plans
from sae_steer.errors import InputError
from sae_steer.model.batching import length_batches
from sae_steer.settings import SPLITS


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_the_models_own_streams_at_the_labelled_positions(pair, cache, split):
    texts = cache.texts(split)
    for model in pair.models:
        for layer in (1, 2):
            rows = torch.cat(list(cache.rows(model.name, layer, split).in_order()))
            assert len(rows) == sum(map(len, texts))
            for text, stored in islice(zip(texts, rows.split([len(text) for text in texts]), strict=True), 6):
                tokens = torch.from_numpy(text.token.astype(np.int64))[None]
                expected = model.model.resid_posts(tokens, (layer,))[layer][0]
                torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-3)


def test_float32_rows_are_exact_to_the_arithmetic(tiny, tmp_path):
    cache = write(tiny, tmp_path / "exact", settings=replace(SETTINGS, dtype="float32"))
    rows, text = next(cache.rows("adhd", 2, "scan").in_order()), cache.texts("scan")[0]
    expected = tiny.target.model.resid_posts(torch.from_numpy(text.token.astype(np.int64))[None], (2,))[2][0]
    torch.testing.assert_close(rows[: len(text)], expected, rtol=1e-5, atol=1e-5)


def test_labels_are_the_grammars(tiny, whole):
    cache, first = ActivationCache.open(whole), 0
    for split in SPLITS:
        count = getattr(FEW, f"{split}_plans")
        texts = cache.texts(split)
        assert len(texts) == 2 * count
        for variant in (0, 1):
            plans = write_plans(split, cache.variants[variant], count=count, seed=0)
            own = [text for text in texts if text.rendering == variant]
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


def test_rows_are_read_at_their_place_in_the_file_as_h5py_reads_them(whole):
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


def special(folder) -> list[int]:
    """The ids of the embedded tokenizer's special tokens that open no step."""
    names = ActivationCache.open(folder).manifest["special_tokens"]
    assert len(names) == 3
    return names


def test_the_moments_are_numpys_over_the_rows_that_count(whole):
    rows = ActivationCache.open(whole).rows("adhd", 2, "train")
    token = ActivationCache.open(whole).labels("train")["token"]
    ours = ~np.isin(token, special(whole))
    every = np.concatenate([np.asarray(part).astype(np.float64) for part in rows.maps])[ours]
    assert rows.n_rows == len(every) < len(token)
    np.testing.assert_allclose(rows.mean.numpy(), every.mean(0), rtol=1e-6, atol=1e-6)
    assert rows.mean_square == pytest.approx(((every - every.mean(0)) ** 2).sum(1).mean(), rel=1e-9)


def test_rows_are_taken_by_number_across_shards(whole):
    rows = ActivationCache.open(whole).rows("adhd", 2, "train")
    every = torch.cat(list(rows.in_order(size=100)))
    chosen = np.array([0, 5, 599, 600, 601, len(every) - 1])
    assert torch.equal(rows.take(chosen), every[chosen])


def test_own_renderings_are_those_of_a_models_name(whole):
    cache = ActivationCache.open(whole)
    assert (cache.own_variants("standard"), cache.own_variants("adhd"), cache.own_variants("base")) == (
        (0,), (1,), (0, 1),
    )  # fmt: skip
    assert {text.rendering for text in cache.own_texts("scan", "adhd")} == {1}


def test_a_batch_is_a_pure_function_of_its_step_and_seed(whole):
    one, other = (ActivationCache.open(whole).rows("adhd", 2, "train") for _ in range(2))
    forward = [one.batch(step, 64, 0) for step in range(200)]
    backward = [other.batch(step, 64, 0) for step in reversed(range(200))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(one.batch(0, 64, 0), one.batch(0, 64, 1))


def test_an_epoch_reads_every_whole_block_once_and_the_next_one_in_another_order(whole):
    rows = ActivationCache.open(whole, keep_special_tokens=True).rows("standard", 0, "train")
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
    rows = ActivationCache.open(whole, keep_special_tokens=True).rows("standard", 0, "train")
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


def test_stored_rows_are_indexed_as_an_array_is(whole):
    part = ActivationCache.open(whole).rows("adhd", 2, "train").maps[0]
    every = np.asarray(part)
    assert (len(part), part.shape) == (len(every), every.shape)
    mask = np.arange(len(every)) % 7 == 3
    for chosen in (slice(3, 9), slice(None, None, 5), slice(9, 3), mask, np.array([5, 400, 7]), np.array([], int)):
        np.testing.assert_array_equal(part[chosen], every[chosen])


def test_few_files_stay_open(whole, monkeypatch):
    from sae_steer.cache import stored

    files = stored.OpenFiles(2)
    monkeypatch.setattr(stored, "_FILES", files)
    rows = ActivationCache.open(whole).rows("adhd", 2, "train")
    assert len(rows.maps) > 2
    every = torch.cat(list(rows.in_order(size=100)))
    assert torch.equal(rows.take(np.arange(len(every))), every)
    assert len(files._files) == 2
