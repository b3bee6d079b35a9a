"""The scan: planted features are found, counts are what a dense count gives, and what was saved comes back."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from sae_steer import stats
from sae_steer.cache import ActivationCache, ActivationRows
from sae_steer.dictionary import Dictionary
from sae_steer.errors import InputError
from sae_steer.pipeline import find_or_scan
from sae_steer.randomness import generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.sae.stability import SeedStability
from sae_steer.scan import (
    BY_TASK_FILE,
    RECORD_FILE,
    TABLE_FILE,
    FiringCounter,
    load_scan,
    resolve_index,
    save_scan,
    scan_features,
    scan_provenance,
    tells_stability,
)
from sae_steer.settings import ScanSettings

D_MODEL, D_SAE, PLANTED, SHARED = 16, 16, 5, 2
TASKS, ROWS = 60, 24


class Planted(ActivationCache):
    """A cache whose streams are sums of basis vectors: `SHARED` fires in both models, `PLANTED` at the
    target's onsets of target-rendered text, everything else now and then in both alike.
    """

    def labels(self, split):
        n = 2 * TASKS * ROWS
        row = np.arange(n)
        return {
            "task": (row // (2 * ROWS)).astype(np.int32),
            "text_variant": (row // ROWS % 2).astype(np.uint8),
            "is_onset": (row % 3 == 0).astype(np.uint8),
        }

    def rows(self, model, layer, split):
        labels = self.labels(split)
        random = np.random.default_rng(self.manifest["seeds"][model])
        fires = random.random((len(labels["task"]), D_MODEL)) < 0.1
        fires[:, SHARED] = random.random(len(fires)) < 0.8
        here = (labels["is_onset"] == 1) & (labels["text_variant"] == 1)
        fires[:, PLANTED] = here & (random.random(len(fires)) < self.manifest["rates"][model])
        resid = fires.astype(np.float32)
        halves = (resid[: len(resid) // 2], resid[len(resid) // 2 :])
        return ActivationRows(halves, resid.sum(0), (resid**2).sum(0), "planted")


def planted_cache(rates):
    facts = {"d_model": D_MODEL, "sha256": "a"}
    return Planted(
        Path("nowhere"),
        {
            "variants": ["standard", "adhd"],
            "models": {"standard": facts, "adhd": facts},
            "layers": [2],
            "seeds": {"standard": 1, "adhd": 2},
            "rates": rates,
        },
    )


@pytest.fixture(scope="module")
def basis():
    """Feature i reads axis i past a threshold."""
    sae = TopKSAE(TopKConfig(d_in=D_MODEL, d_sae=D_SAE, k=D_SAE)).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(D_MODEL))
    sae.W_dec.copy_(torch.eye(D_MODEL))
    sae.b_enc.fill_(-0.5)
    return Dictionary(sae, "adhd", 2, {"model_sha256": "a"}, "b" * 64)


@pytest.fixture(scope="module")
def planted(basis):
    return scan_features(planted_cache({"adhd": 0.6, "standard": 0.0}), basis)


@pytest.fixture
def saved(scan, cache, dictionary, tmp_path):
    """The folder of a saved scan."""
    save_scan(scan, tmp_path, scan_provenance(cache, dictionary, scan.settings))
    return tmp_path


def test_a_planted_feature_is_found_at_rank_one_and_nothing_else_is(planted):
    assert planted.top(3) == [PLANTED]
    assert planted.specific.sum() == 1
    assert planted.target_rate[PLANTED] == pytest.approx(0.6, abs=0.05)
    assert planted.reference_rate[PLANTED] == 0
    assert planted.resolve("top") == planted.resolve("like-2504") == PLANTED
    assert planted.percentile[PLANTED] == planted.percentile.max()


def test_models_that_fire_alike_have_no_specific_feature(basis):
    null = scan_features(planted_cache({"adhd": 0.3, "standard": 0.3}), basis)
    assert not null.specific.any()
    assert (null.q > 0.05).all()
    assert null.top(5) == []
    with pytest.raises(InputError, match="no feature is specific to the target model"):
        null.resolve("top")


def test_counts_equal_a_dense_count(scan, cache, dictionary):
    labels = cache.labels("scan")
    sae = dictionary.sae
    for model, by_task in (("adhd", scan.target_hits), ("standard", scan.reference_hits)):
        resid = torch.cat(list(cache.rows(model, 2, "scan").in_order()))
        codes = sae.encode(resid)
        dense, kept = codes.dense().numpy() > 0, ~np.isin(labels["token"], (1024, 1027, 1028))
        for variant, rendering in enumerate(cache.variants):
            for place, onset in (("onset", 1), ("elsewhere", 0)):
                cell = (labels["text_variant"] == variant) & (labels["is_onset"] == onset) & kept
                assert scan.cells[f"{model}/{rendering}/{place}"] == cell.sum()
                assert np.array_equal(scan.hits[f"{model}/{rendering}/{place}"], dense[cell].sum(0))
        own = (labels["text_variant"] == cache.variants.index("adhd")) & (labels["is_onset"] == 1)
        tasks = np.unique(labels["task"][own])
        assert np.array_equal(scan.trials, [(labels["task"][own] == task).sum() for task in tasks])
        assert np.array_equal(by_task.toarray(), [dense[own & (labels["task"] == task)].sum(0) for task in tasks])


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 100], [50, 50]])
def test_counts_do_not_depend_on_how_batches_are_cut(cuts):
    sae = TopKSAE(TopKConfig(d_in=8, d_sae=20, k=4)).requires_grad_(False)
    sae.W_enc.normal_(generator=generator(1))
    rows = torch.randn(200, 8, generator=generator(2))
    random = np.random.default_rng(0)
    cell, task = random.integers(4, size=200), random.integers(-1, 6, size=200)
    whole, cut = FiringCounter(20, 4, 6), FiringCounter(20, 4, 6)
    whole.update(sae, rows, cell, task)
    for part in np.split(np.arange(200), cuts):
        cut.update(sae, rows[part], cell[part], task[part])
    assert torch.equal(whole.hits, cut.hits)
    assert (whole.task_hits != cut.task_hits).nnz == 0
    assert whole.hits.sum() == (sae.encode(rows).values > 0).sum()
    assert 0 < whole.task_hits.sum() < whole.hits.sum(), "rows of no task are counted by cell alone"


def test_the_columns_agree_with_each_other(scan):
    table = scan.columns
    assert set(map(len, table.values())) == {scan.d_sae}
    for side in ("target", "reference"):
        assert np.allclose(table[f"{side}_rate"], table[f"{side}_hits"] / table["onsets"])
        assert (table[f"{side}_rate_low"] <= table[f"{side}_rate"] + 1e-12).all()
        assert (table[f"{side}_rate"] <= table[f"{side}_rate_high"] + 1e-12).all()
        simple = stats.wilson(table[f"{side}_hits"], table["onsets"])
        assert (table[f"{side}_rate_low"] <= simple[0] + 1e-12).all(), "tasks as clusters never narrow an interval"
    assert (table["log_odds_low"] <= table["log_odds"]).all()
    assert (table["log_odds"] <= table["log_odds_high"]).all()
    more = table["target_hits"] > table["reference_hits"]
    assert np.array_equal(np.sign(table["log_odds"]) > 0, more)
    assert (table["q"] >= table["p"]).all()
    assert np.allclose(table["q"], stats.benjamini_hochberg(table["p"]))
    order = np.argsort(table["log_odds_low"], kind="stable")
    assert (np.diff(table["percentile"][order]) >= 0).all()
    assert table["percentile"].min() >= 0
    assert table["percentile"].max() <= 100


def test_specific_is_rate_and_q_and_ratio_and_top_follows_the_lower_bound(scan):
    table = scan.columns
    wanted = (
        (table["target_rate"] >= 0.01) & (table["q"] < 0.05) & (table["target_rate"] >= 10 * table["reference_rate"])
    )
    assert np.array_equal(table["specific"], wanted)
    top = scan.top(scan.d_sae)
    assert sorted(top) == np.flatnonzero(wanted & (scan.task_share >= 0.15)).tolist()
    assert (np.diff(table["log_odds_low"][top]) <= 0).all()
    assert scan.top(2) == top[:2]
    stricter = dataclasses.replace(scan, settings=ScanSettings(min_rate=0.5))
    assert set(stricter.top(scan.d_sae)) <= set(top)


def test_the_record_has_the_released_keys_and_their_shape(saved, scan):
    record = json.loads((saved / RECORD_FILE).read_text())
    assert list(record)[1:6] == [
        "sae_results",
        "primary_count",
        "symmetry_count",
        "layer_control_count",
        "primary_top_features",
    ]
    assert list(record["sae_results"]) == ["adhd_L2"]
    assert set(record["sae_results"]["adhd_L2"]) == {"final_fve", "final_l0", "dead_pct_train", "dead_pct_heldout"}
    assert record["primary_count"] == scan.specific.sum()
    assert record["symmetry_count"] is None
    listed = record["primary_top_features"]
    assert listed
    assert all(set(row) == {"feat_id", "adhd_rate", "std_rate"} for row in listed)
    rates = [row["adhd_rate"] for row in listed]
    assert rates == sorted(rates, reverse=True)
    mixed = [f"adhd/{rendering}/onset" for rendering in ("standard", "adhd")]
    first = listed[0]["feat_id"]
    assert rates[0] == sum(scan.hits[c][first] for c in mixed) / sum(scan.cells[c] for c in mixed)
    assert record["top"] == [scan.row(feature) for feature in scan.top(20)]
    assert record["like_2504"] == scan.row(scan.like_2504())


def test_a_scan_survives_save_and_load_unchanged(saved, scan, dictionary, cache, tmp_path_factory):
    loaded = load_scan(saved, dictionary)
    assert loaded.settings == scan.settings
    assert loaded.cells == scan.cells
    assert loaded.columns.keys() == scan.columns.keys()
    for name, column in scan.columns.items():
        assert np.array_equal(loaded.columns[name], column), name
    assert np.array_equal(loaded.trials, scan.trials)
    assert loaded.left_out == scan.left_out
    for name in ("target_hits", "reference_hits"):
        assert np.array_equal(getattr(loaded, name).toarray(), getattr(scan, name).toarray())
    assert loaded.table(10) == scan.table(10)
    again = tmp_path_factory.mktemp("again")
    save_scan(loaded, again, scan_provenance(cache, dictionary, scan.settings))
    for name in (RECORD_FILE, TABLE_FILE, BY_TASK_FILE):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


@pytest.fixture(scope="module")
def of_three_seeds(dictionary):
    """The dictionary, compared with two others: feature i at cosines .1 and .9 in turn."""
    d_sae = dictionary.sae.config.d_sae
    cosines = np.array([np.where(np.arange(d_sae) % 2, 0.9, 0.1), np.full(d_sae, 0.5)])
    return dataclasses.replace(dictionary, stability=SeedStability(np.zeros((2, d_sae), int), cosines))


def test_a_scan_shows_how_stable_features_are_over_seeds(cache, scan, of_three_seeds, tmp_path):
    shown = scan_features(cache, of_three_seeds)
    feature = scan.top(1)[0]
    mean, least = (0.7, 0.5) if feature % 2 else (0.3, 0.1)
    assert shown.row(feature)["stability"] == pytest.approx(mean)
    assert shown.row(feature)["stability_least"] == least
    assert f"{mean:.2f} (min {least:.2f})" in shown.table(1)
    save_scan(shown, tmp_path, scan_provenance(cache, of_three_seeds, shown.settings))
    record = json.loads((tmp_path / RECORD_FILE).read_text())
    assert record["top"][0]["stability"] == pytest.approx(mean)
    assert load_scan(tmp_path, of_three_seeds).row(feature) == shown.row(feature)
    assert shown.top(100) == scan.top(100)


def test_a_scan_without_other_seeds_says_null(saved, scan):
    record = json.loads((saved / RECORD_FILE).read_text())
    assert record["seed_stability"] is None
    assert {row["stability"] for row in record["top"]} == {None}
    assert "seeds" not in scan.table(1)


def test_seeds_learned_after_a_scan_are_shown_without_counting_again(cache, dictionary, of_three_seeds, tmp_path):
    found = find_or_scan(cache, dictionary, tmp_path)
    before = (tmp_path / RECORD_FILE).read_bytes()
    assert tells_stability(tmp_path, found)
    counted = []
    later = find_or_scan(cache, of_three_seeds, tmp_path, on_rows=lambda *told: counted.append(told))
    assert not counted
    record = json.loads((tmp_path / RECORD_FILE).read_text())
    assert record["seed_stability"] == of_three_seeds.stability.sha256
    assert record["top"] == [later.row(feature) for feature in later.top(20)]
    assert record["top"][0]["stability"] is not None
    find_or_scan(cache, dictionary, tmp_path)
    assert (tmp_path / RECORD_FILE).read_bytes() == before


def test_a_scan_of_another_dictionary_is_refused(saved, dictionary):
    with pytest.raises(InputError, match="is of another dictionary than adhd_L2_hook_resid_post"):
        load_scan(saved, dataclasses.replace(dictionary, sha256="0" * 64))


def test_a_scan_that_is_not_there_or_not_ours_is_told_in_one_line(saved, dictionary, tmp_path_factory):
    with pytest.raises(InputError, match=r"no scan in .*; run `sae-steer scan` first"):
        load_scan(tmp_path_factory.mktemp("empty"), dictionary)
    (saved / RECORD_FILE).write_text(json.dumps({"sae_results": {}, "primary_count": 312}))
    with pytest.raises(InputError, match="lacks 'provenance'; run `sae-steer scan --force`"):
        load_scan(saved, dictionary)
    (saved / RECORD_FILE).write_text("{")
    with pytest.raises(InputError, match="not a whole record"):
        load_scan(saved, dictionary)


def test_features_are_named_by_index_top_or_like_2504(scan):
    assert scan.resolve("top") == scan.top(1)[0]
    assert scan.resolve("like-2504") == scan.like_2504()
    assert scan.resolve("0") == 0
    assert scan.resolve(str(scan.d_sae - 1)) == scan.d_sae - 1
    assert resolve_index("2504", 4096) == 2504
    for wrong in ("-1", str(scan.d_sae)):
        with pytest.raises(InputError, match=f"not in this dictionary; it has features 0 to {scan.d_sae - 1}"):
            scan.resolve(wrong)
    with pytest.raises(InputError, match="takes an index, top or like-2504, not 'best'"):
        scan.resolve("best")


def test_like_2504_fires_nearest_59_percent_among_those_all_but_silent_in_the_reference(scan):
    quiet = (scan.reference_rate <= 0.005) & (scan.target_rate > 0)
    found = scan.like_2504()
    assert quiet[found]
    assert abs(scan.target_rate[found] - 0.59) == np.abs(scan.target_rate[quiet] - 0.59).min()
    everywhere = csc_array(np.broadcast_to(scan.trials[:, None], scan.reference_hits.shape))
    loud = dataclasses.replace(scan, reference_hits=everywhere)
    with pytest.raises(
        InputError, match=r"every feature of 'adhd' fires at more than 0.005 of the onsets in 'standard'"
    ):
        loud.like_2504()


def test_a_dictionary_that_does_not_fit_the_cache_is_refused(cache, dictionary):
    for other, match in (
        (dataclasses.replace(dictionary, model="gpt"), "is of model 'gpt', and this cache holds standard and adhd"),
        (dataclasses.replace(dictionary, layer=4), "layers"),
        (
            dataclasses.replace(dictionary, sae=TopKSAE(TopKConfig(d_in=64, d_sae=8, k=2))),
            "reads 64 dimensions and model 'adhd' has 128",
        ),
        (
            dataclasses.replace(dictionary, record={**dictionary.record, "model_sha256": "0"}),
            "was trained on another model called 'adhd'",
        ),
    ):
        with pytest.raises(InputError, match=match):
            scan_features(cache, other)


def test_one_task_is_too_few_for_an_interval(basis, monkeypatch):
    cache = planted_cache({"adhd": 0.6, "standard": 0.0})
    several = Planted.labels
    monkeypatch.setattr(Planted, "labels", lambda self, split: several(self, split) | {"task": np.zeros(2_880, int)})
    with pytest.raises(InputError, match="onsets of 1 tasks, and intervals over tasks need 2"):
        scan_features(cache, basis)
    monkeypatch.setattr(
        Planted, "labels", lambda self, split: several(self, split) | {"is_onset": np.zeros(2_880, int)}
    )
    with pytest.raises(InputError, match="onsets of 0 tasks"):
        scan_features(cache, basis)


def test_progress_counts_the_rows_of_both_models(cache, dictionary):
    told = []
    scan_features(cache, dictionary, on_rows=lambda done, total, note="": told.append((done, total)))
    rows = len(cache.labels("scan")["task"])
    assert told[-1] == (2 * rows, 2 * rows)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
