"""A scan takes the memory of its firings, not of clusters x features; rows that do not count are in no cell."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from long_rows import TASK, common_word, write_long_pair
from scipy.sparse import csc_array
from tiny_cache import FEW, SETTINGS, write
from tiny_pair import PACKAGED, SHAPE

from sae_steer import stats
from sae_steer.dictionary import Dictionary
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.records import read_json, read_table, write_json, write_table
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.scan import BY_TASK_FILE, RECORD_FILE, load_scan, save_scan, scan_features, scan_provenance
from sae_steer.scan.counting import SparseTally
from sae_steer.scan.features import FeatureScan
from sae_steer.scan.pairing import paired_firings
from sae_steer.settings import ScanSettings

CLUSTERS, WIDE = 800, 16_384
PROVENANCE = {"sae_steer": "0", "commit": None, "settings": {}, "inputs": {"dictionary": "d"}}
ANY = Dictionary(TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2)), "adhd", 2, {}, "d")


def hits(seed: int, clusters: int, d_sae: int, *, each: int = 40) -> csc_array:
    """Each cluster has `each` features that fire once or twice."""
    random = np.random.default_rng(seed)
    row = np.repeat(np.arange(clusters), each)
    column = np.concatenate([random.choice(d_sae, each, replace=False) for _ in range(clusters)])
    return csc_array((random.integers(1, 3, len(row)), (row, column)), shape=(clusters, d_sae))


def wide_scan(**sides) -> FeatureScan:
    names = ("adhd/adhd/onset", "standard/adhd/onset")
    cells = dict.fromkeys(names, 2 * CLUSTERS)
    return FeatureScan(
        dictionary="wide", target="adhd", reference="standard", cells=cells,
        hits={name: side.sum(0) for name, side in zip(names, sides.values(), strict=True)},
        **sides, trials=np.full(CLUSTERS, 2), settings=ScanSettings(), record={},
    )  # fmt: skip


def test_a_wide_scan_is_judged_saved_and_read_in_a_fraction_of_its_dense_counts(tmp_path):
    sides = {name: hits(seed, CLUSTERS, WIDE) for seed, name in enumerate(("target_hits", "reference_hits"))}
    dense = 2 * CLUSTERS * WIDE * 8
    tracemalloc.start()
    found = wide_scan(**sides)
    found.columns  # noqa: B018
    save_scan(found, tmp_path, PROVENANCE)
    loaded = load_scan(tmp_path, ANY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.25 * dense, f"{peak / 2**20:.0f} MiB beside {dense / 2**20:.0f} MiB of dense counts"
    assert (loaded.target_hits != found.target_hits).nnz == 0
    assert loaded.columns.keys() == found.columns.keys()


def test_blocks_of_features_give_the_statistics_of_all_at_once(monkeypatch):
    target, reference, trials = hits(1, 60, 500), hits(2, 60, 500), np.full(60, 2)
    monkeypatch.setattr("sae_steer.scan.pairing.BLOCK_BYTES", 8 * 60 * 37)
    found = paired_firings(target, reference, trials)
    a, b = target.toarray(), reference.toarray()
    odds = stats.paired_log_odds(a, b, trials[:, None])
    for name in ("log_odds", "se", "low", "high", "p"):
        assert np.array_equal(getattr(found.log_odds, name), getattr(odds, name)), name
    assert (found.log_odds.level, found.log_odds.clusters) == (odds.level, odds.clusters)
    assert np.array_equal(found.p, stats.paired_rate_p(a, b, trials[:, None]))
    for side, effect in zip((a, b), found.design_effects, strict=True):
        assert np.array_equal(effect, stats.design_effect(side, trials[:, None]))


def test_a_sparse_tally_counts_as_numpy_does(monkeypatch):
    monkeypatch.setattr("sae_steer.scan.counting.AT_ONCE", 100)
    random, tally = np.random.default_rng(0), SparseTally()
    batches = [random.integers(0, 10**12, 70) % 501 * 10**9 for _ in range(20)]
    for batch in batches:
        tally.add(batch)
    keys, counts = np.unique(np.concatenate(batches), return_counts=True)
    assert np.array_equal(tally.totals()[0], keys)
    assert np.array_equal(tally.totals()[1], counts)
    assert [len(part) for part in SparseTally().totals()] == [0, 0]


def test_a_scan_saved_before_counts_were_sparse_is_read(tmp_path):
    found = wide_scan(target_hits=hits(0, CLUSTERS, 256), reference_hits=hits(1, CLUSTERS, 256))
    save_scan(found, tmp_path, PROVENANCE)
    sides = {side: list(getattr(found, side).toarray()) for side in ("target_hits", "reference_hits")}
    write_table(tmp_path / BY_TASK_FILE, {"onsets": found.trials, **sides})
    record = read_json(tmp_path / RECORD_FILE)
    write_json(tmp_path / RECORD_FILE, {key: record[key] for key in record if key not in ("files", "seal")})
    loaded = load_scan(tmp_path, ANY)
    assert np.array_equal(loaded.columns["log_odds"], found.columns["log_odds"])
    assert (loaded.reference_hits != found.reference_hits).nnz == 0


def test_a_task_without_a_firing_has_its_row_all_the_same(tmp_path):
    sides = {"target_hits": hits(0, CLUSTERS, 64, each=1), "reference_hits": csc_array((CLUSTERS, 64), dtype=int)}
    found = wide_scan(**sides)
    save_scan(found, tmp_path, PROVENANCE)
    assert set(map(len, read_table(tmp_path / BY_TASK_FILE)["reference_features"])) == {0}
    loaded = load_scan(tmp_path, ANY)
    assert loaded.reference_hits.shape == (CLUSTERS, 64)
    assert loaded.reference_hits.nnz == 0


@pytest.fixture(scope="module")
def sinks(pair, tmp_path_factory):
    """The cache of a pair with long rows at the first token and at an ordinary word, and that word."""
    folder: Path = tmp_path_factory.mktemp("sinks")
    word = common_word(pair, list(GeneratedTexts(FEW).texts(pair, "train")))
    long = write_long_pair(folder / "pair", PACKAGED, [TASK, word])
    return long, write(long, folder / "cache", layers=(2,), settings=SETTINGS), word


def test_rows_that_do_not_count_are_in_no_cell_and_onsets_all_are(sinks, tmp_path):
    pair, cache, word = sinks
    sae = TopKSAE(TopKConfig(d_in=SHAPE.d_model, d_sae=2 * SHAPE.d_model, k=4)).requires_grad_(False)
    sae.W_enc.normal_()
    record = {"model_sha256": pair.target.sha256}
    dictionary = Dictionary(sae, "adhd", 2, record, "d")
    found, labels = scan_features(cache, dictionary), cache.labels("scan")
    out = np.isin(labels["token"], (TASK, 1027, 1028, word)) & (labels["is_onset"] == 0)
    assert (
        sum(found.cells[f"adhd/{variant}/elsewhere"] for variant in cache.variants)
        == ((labels["is_onset"] == 0) & ~out).sum()
    )
    assert sum(found.cells[f"adhd/{variant}/onset"] for variant in cache.variants) == labels["is_onset"].sum()
    assert (found.left_out.rows, found.left_out.special_tokens + found.left_out.long) == (len(out), out.sum())
    assert "longer than 10 medians" in found.table(1)
    save_scan(found, tmp_path, scan_provenance(cache, dictionary, found.settings))
    assert read_json(tmp_path / RECORD_FILE)["rows_left_out"] == found.left_out.record()
    assert load_scan(tmp_path, dictionary).left_out == found.left_out
