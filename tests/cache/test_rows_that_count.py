"""A cache says which of its rows count, by token and by length, caches from before it was asked too."""

import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from long_rows import TASK, common_word, write_long_pair
from tiny_cache import SETTINGS, contents, refusal, write
from tiny_pair import PACKAGED

from sae_steer.cache import ActivationCache, site
from sae_steer.cache.layout import NORMS
from sae_steer.errors import InputError
from sae_steer.files import read_tensors, sha256
from sae_steer.records import write_json

SPECIAL = (1024, 1027, 1028)


@pytest.fixture(scope="module")
def word(tiny, whole):
    return common_word(tiny, ActivationCache.open(whole).texts("train"))


@pytest.fixture(scope="module")
def sinks(tmp_path_factory, word):
    """A pair with long rows at the first token and at a word of the texts, and its cache."""
    folder = tmp_path_factory.mktemp("sinks")
    pair = write_long_pair(folder / "pair", PACKAGED, [TASK, word])
    return pair, write(pair, folder / "cache", layers=(2,), settings=replace(SETTINGS, dtype="auto"))


def every(rows) -> np.ndarray:
    return torch.cat(list(rows.in_order())).double().numpy()


def before_norms(cache: ActivationCache, folder):
    """The cache as the package wrote it before shards had norms and manifests special tokens."""
    shutil.copytree(cache.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["special_tokens"]
    for line in manifest["shards"]:
        with h5py.File(folder / line["file"], "a") as file:
            del file[NORMS]
        line["bytes"], line["sha256"] = (folder / line["file"]).stat().st_size, sha256(folder / line["file"])
    write_json(folder / "manifest.json", manifest)
    return folder


def test_rows_of_special_tokens_and_long_words_do_not_count_and_onsets_do(sinks, word):
    _, cache = sinks
    labels = cache.labels("train")
    rows = cache.rows("adhd", 2, "train")
    expected = ~np.isin(labels["token"], (*SPECIAL, word)) | (labels["is_onset"] == 1)
    assert np.array_equal(rows.counts, expected)
    assert rows.n_rows == expected.sum()
    left = rows.selection.left_out
    assert (left.rows, left.special_tokens) == (len(expected), np.isin(labels["token"], SPECIAL).sum())
    assert left.long == (labels["token"] == word).sum() > 0
    norms = np.linalg.norm(every(rows), axis=1)
    assert norms[labels["token"] == word].min() > 10 * left.median_norm
    assert left.median_norm == pytest.approx(np.median(norms[~np.isin(labels["token"], SPECIAL)]), rel=1e-5)


def test_mean_and_scale_are_those_of_the_rows_that_count(sinks):
    _, cache = sinks
    rows = cache.rows("adhd", 2, "train")
    ours = every(rows)[rows.counts]
    np.testing.assert_allclose(rows.mean.numpy(), ours.mean(0), rtol=1e-4, atol=1e-5)
    assert rows.mean_square == pytest.approx(((ours - ours.mean(0)) ** 2).sum(1).mean(), rel=1e-6)


def test_kept_they_are_dealt_and_decide_no_scale(sinks, word):
    _, cache = sinks
    kept = ActivationCache.open(cache.folder, keep_special_tokens=True).rows("adhd", 2, "train")
    assert kept.counts.all()
    usual = every(kept)[~np.isin(cache.labels("train")["token"], (TASK, word))]
    assert kept.mean_square == pytest.approx(((usual - usual.mean(0)) ** 2).sum(1).mean(), rel=1e-6)
    assert kept.fingerprint != cache.rows("adhd", 2, "train").fingerprint


def test_an_epoch_deals_every_row_that_counts_at_most_once_and_no_other(sinks):
    _, cache = sinks
    rows = cache.rows("adhd", 2, "train")
    allowed = {row.tobytes() for row in every(rows).astype(np.float32)[rows.counts]}
    steps = sum(int(part.sum()) // 16 for part in np.split(rows.counts, np.cumsum([len(m) for m in rows.maps])[:-1]))
    dealt = [row.tobytes() for step in range(steps) for row in rows.batch(step, 16, 0).numpy()]
    assert set(dealt) <= allowed
    assert len(dealt) == 16 * steps > 0.9 * rows.n_rows
    assert set(dealt) == {row.tobytes() for step in range(steps, 2 * steps) for row in rows.batch(step, 16, 0).numpy()}


def test_a_cache_from_before_norms_were_stored_reads_alike_and_keeps_what_it_measured(sinks, tmp_path):
    pair, cache = sinks
    old = before_norms(cache, tmp_path / "old")
    opened = ActivationCache.open(old, pair=pair)
    new, measured = cache.rows("adhd", 2, "train"), opened.rows("adhd", 2, "train")
    assert np.array_equal(measured.counts, new.counts)
    assert measured.selection.left_out == new.selection.left_out
    assert torch.equal(measured.batch(3, 64, 1), new.batch(3, 64, 1))
    (kept,) = old.glob("norms-*.safetensors")
    with h5py.File(cache.folder / "shard-00000.h5") as file:
        stored = file[f"{NORMS}/adhd/{site(2)}"][:]
    assert np.array_equal(read_tensors(kept)[0][NORMS].numpy()[: len(stored)], stored)
    for damaged in (kept.read_bytes()[:-8], kept.read_bytes()[:-8] + b"\x00" * 8):
        kept.write_bytes(damaged)
        assert np.array_equal(opened.rows("adhd", 2, "train").counts, new.counts), "a damaged one is measured again"


def test_a_cache_that_does_not_name_its_special_tokens_asks_for_its_pair(sinks, tmp_path):
    _, cache = sinks
    old = before_norms(cache, tmp_path / "old")
    said = refusal(InputError, lambda: ActivationCache.open(old).rows("adhd", 2, "train"))
    assert "open it with ActivationCache.open(folder, pair=...), or with keep_special_tokens=True" in said
    assert ActivationCache.open(old, keep_special_tokens=True).rows("adhd", 2, "train").counts.all()


def test_norms_do_not_depend_on_how_texts_were_cut_into_shards_and_come_out_alike(sinks, tmp_path):
    pair, cache = sinks
    settings = replace(SETTINGS, dtype="auto")
    again = write(pair, tmp_path / "again", layers=(2,), settings=settings)
    assert contents(again.folder) == contents(cache.folder)
    other = write(pair, tmp_path / "cut", layers=(2,), settings=replace(settings, rows_per_shard=2_500))
    assert len(other.manifest["shards"]) < len(cache.manifest["shards"])
    one, two = (c.rows("adhd", 2, "train") for c in (cache, other))
    assert np.array_equal(one.counts, two.counts)
    assert one.mean_square == pytest.approx(two.mean_square, rel=1e-3)


def test_a_pair_whose_steps_begin_at_a_regular_expression_keeps_the_delimiters_it_names(tiny):
    by_tokens = tiny.special_tokens
    assert by_tokens == (1024, 1027, 1028)
    by_regex = replace(tiny, onsets=replace(tiny.onsets, tokens=(), regex=r"<\|(steps|sep)\|>"))
    assert by_regex.special_tokens == by_tokens
    assert replace(tiny, onsets=replace(tiny.onsets, tokens=(), regex=r"\n\d+\)")).special_tokens == (
        1024, 1025, 1026, 1027, 1028,
    )  # fmt: skip
