"""Many features at once on the toy pair, in which feature 7 is the cause and the others read what nothing reads."""

import dataclasses

import numpy as np
import pytest
import torch
from toy import FEATURE, INTERVENE, toy_sae

from sae_steer import stats
from sae_steer.atlas import attribution, pool
from sae_steer.atlas.atlas import load_atlas, make_atlas
from sae_steer.atlas.survey import BEYOND, INSIDE, RARE, tag
from sae_steer.dictionary import Dictionary
from sae_steer.edits.directions import feature_direction, feature_directions
from sae_steer.effects.readings import Onsets
from sae_steer.errors import InputError
from sae_steer.model.readout import TargetMass
from sae_steer.model.replay import CleanPass
from sae_steer.settings import AtlasSettings
from sae_steer.study.of_pair import intervene

ATLAS = AtlasSettings(
    prompts=36, onsets_per_prompt=2, bootstrap_draws=400, null_draws=600, null_onsets=24, ablation_onsets=3, norms=3
)
TESTED = (2, 5, FEATURE, 11)
ALIVE = np.arange(24)
LOG_ODDS = np.linspace(-1, 4, 24)
VARIANTS = ("inject", "subtract", "zero_ablate", "upstream")


def atlas_of(pair, cache, dictionary, **knobs):
    known = {"features": TESTED, "alive": ALIVE, "log_odds": LOG_ODDS, "settings": ATLAS} | knobs
    return make_atlas(pair, dictionary, cache=cache, **known)


@pytest.fixture(scope="module")
def wide(toy_pair):
    """A dictionary in which more features fire at onsets than in the toy one."""
    record = {"model": "adhd", "layer": 2, "model_sha256": toy_pair.target.sha256}
    return Dictionary(toy_sae(k=12), "adhd", 2, record, "1" * 64)


@pytest.fixture(scope="module")
def atlas(toy_pair, toy_cache, wide):
    return atlas_of(toy_pair, toy_cache, wide)


def rows_of(atlas, feature):
    """{variant: the record's row}"""
    return {row["variant"]: row for row in atlas.record["features"] if row["feature"] == feature}


# What is found


def test_the_planted_cause_is_beyond_the_bound_and_its_controls_in_every_variant(atlas):
    found = rows_of(atlas, FEATURE)
    assert {name: row["tag"] for name, row in found.items()} == dict.fromkeys(VARIANTS, BEYOND)
    for name, sign in zip(VARIANTS, (1, -1, -1, 1), strict=True):
        assert sign * found[name]["low"] > atlas.record["bound"]["value"]
        assert not found[name]["null_low"] <= found[name]["mean"] <= found[name]["null_high"]
        assert found[name]["q"] < 0.05


def test_features_that_nothing_reads_are_not_beyond_the_bound(atlas):
    others = [row for row in atlas.record["features"] if row["feature"] != FEATURE]
    assert len(others) == 4 * (atlas.record["tested"] - 1) > 4
    assert {row["tag"] for row in others} <= {INSIDE, "open", RARE}
    assert all(abs(row["mean"]) < 0.2 * abs(rows_of(atlas, FEATURE)[row["variant"]]["mean"]) for row in others)


def test_an_effect_is_what_a_study_of_the_feature_alone_measures(atlas, toy_pair, toy_cache, wide):
    settings = dataclasses.replace(INTERVENE, generations=0, doses=(0.0, 1.0))
    with pytest.MonkeyPatch.context() as patched:
        from sae_steer.study import of_pair as home

        right = home.ce_recovered
        patched.setattr(home, "ce_recovered", lambda *a, **k: dataclasses.replace(right(*a, **k), recovered=0.97))
        study = intervene(toy_pair, wide, feature=FEATURE, cache=toy_cache, settings=settings)
    found = rows_of(atlas, FEATURE)
    for variant in study.record()["variants"]:
        dose = next(row for row in variant["single"]["doses"] if row["dose"] == 1.0)
        assert found[variant["variant"]]["mean"] == pytest.approx(dose["mean"], abs=1e-5)
        assert variant["direction"] == next(
            v["direction"] for v in atlas.record["variants"] if v["variant"] == variant["variant"]
        )
    assert atlas.record["gap"]["mean"] == pytest.approx(study.record()["gap"]["single"]["mean"], abs=1e-6)
    assert atlas.record["bound"]["value"] == pytest.approx(study.record()["bound"]["value"], abs=1e-6)


def test_every_test_has_its_draws_and_q_is_over_all_of_them(atlas):
    rows = [row for row in atlas.record["features"] if row["q"] is not None]
    assert [row["q"] for row in rows] == pytest.approx(stats.benjamini_hochberg(np.array([row["p"] for row in rows])))
    for variant in atlas.record["variants"]:
        assert variant["null"]["draws"] >= ATLAS.null_draws
        assert sum(variant["tags"].values()) == atlas.record["tested"]
        assert variant["interpolation_error"] < 0.05
    assert min(row["p"] for row in rows) >= 1 / (ATLAS.null_draws + 100)


def test_tags_follow_from_the_tests_passed():
    passed = {"as_predicted": True, "beyond": True, "stands_out": True, "outdone": False, "inside": False}
    assert tag(**passed) == BEYOND
    assert tag(**passed | {"as_predicted": False}) == "opposite"
    assert tag(**passed | {"stands_out": False, "outdone": True}) == "common"
    assert tag(**passed | {"stands_out": False}) == "open", "no control goes as far, and there are too few of them"
    assert tag(**passed | {"beyond": False}) == "open"
    assert tag(**passed | {"beyond": False, "inside": True}) == INSIDE


# Estimates


def test_the_gradient_is_the_directional_derivative_of_an_edit_of_one_onset(toy_pair, toy_cache):
    texts = toy_cache.own_texts("confirm", "adhd")[:4]
    batch = Onsets.of(texts, INTERVENE).single.batches[0]
    model, measure = toy_pair.target.model, TargetMass(tuple(toy_cache.target_tokens(toy_pair).ids))
    positions = batch.positions.clone()
    positions[0, 0] = 0  # a first token reads nothing but itself
    clean = CleanPass.of(model.double(), batch.tokens, 2)
    try:
        found = clean.gradient(positions, measure)
        direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
        step, here = 1e-5, clean.at(positions)
        moved = torch.stack([here + step * direction, here - step * direction])
        after, before = measure(clean.read_single(positions, moved))
    finally:
        model.float()
    assert torch.allclose((found * direction).sum(-1), (after - before) / (2 * step), rtol=1e-5, atol=1e-9)
    assert float(found.abs().max()) > 1e-3


def test_an_estimate_is_the_effect_of_a_small_edit(atlas, toy_pair, toy_cache, wide):
    """The estimate of every tested feature is linear in the edit, so a small part of the edit must meet it."""
    for variant in atlas.record["variants"]:
        assert variant["estimate"]["n"] == atlas.record["tested"]
        assert variant["estimate"]["correlation"] > 0.9
    gradient = np.random.default_rng(0).normal(size=(30, 16))
    codes = wide.sae.encode(torch.randn(30, 16, generator=torch.Generator().manual_seed(1)) * 3)
    decoder = wide.sae.W_dec.double().numpy()
    wanted = -(codes.dense().double().numpy() * (gradient @ decoder.T)).mean(axis=0)
    assert attribution.ablated(gradient, codes, decoder) == pytest.approx(wanted, abs=1e-12)
    shifts = np.random.default_rng(1).normal(size=(5, 16))
    assert attribution.added(gradient, shifts) == pytest.approx((gradient @ shifts.T).mean(axis=0))


def test_the_error_of_an_estimate_counts_what_it_misses():
    exact = np.array([1.0, 2.0, 4.0, -2.0])
    assert attribution.error(exact, exact)["median_relative_error"] == 0
    assert attribution.error(1.5 * exact, exact) == {
        "n": 4, "correlation": pytest.approx(1), "rank_correlation": pytest.approx(1), "median_relative_error": 0.5,
    }  # fmt: skip
    assert attribution.error(exact[:1], exact[:1])["correlation"] is None


# The pool of controls


def test_controls_are_different_and_none_is_near_the_feature_it_ranks():
    random = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(40, 16, generator=random), dim=1)
    stream = torch.randn(200, 16, generator=random).numpy()
    drawn = pool.draw_pool(rows[:3], rows[3:], rows[3:], stream, count=90, seed=0)
    assert drawn.counts["decoder rows"] == 30
    assert (drawn.allowed.sum(axis=1) >= 90).all()
    cosine = (rows[:3] @ drawn.units.T).abs().numpy()
    assert not (cosine[:, :30] > 0.3)[drawn.allowed[:, :30]].any()
    assert (~drawn.allowed).any()
    assert torch.allclose(drawn.units.norm(dim=1), torch.ones(len(drawn.units)))
    assert len(torch.unique(drawn.units, dim=0)) == len(drawn.units)


def test_between_the_norms_a_smooth_effect_is_met_and_at_them_exactly():
    norms = pool.norm_bins(np.array([0.3, 2.0]), 3)
    effect = np.tanh(0.4 * norms) + 0.1 * norms**2
    assert pool.between(norms, norms) @ effect == pytest.approx(effect)
    lengths = np.array([0.0, 0.3, 1.1, 1.9])
    assert pool.between(lengths, norms) @ effect == pytest.approx(np.tanh(0.4 * lengths) + 0.1 * lengths**2, abs=2e-3)
    assert pool.between(np.zeros(1), norms) @ effect == 0


def test_ranked_onsets_are_of_different_tasks_and_every_feature_fires_at_enough():
    random = np.random.default_rng(4)
    task, fires = np.repeat(np.arange(50), 4), random.random((200, 9)) < 0.05
    chosen, spread = pool.ranked_onsets(task, fires, count=40, firings=4, seed=0)
    assert spread == 40
    assert len(np.unique(task[chosen[:spread]])) == 40
    assert len(np.unique(chosen)) == len(chosen) < 80
    assert (fires[chosen].sum(axis=0) >= np.minimum(4, fires.sum(axis=0))).all()


def test_a_direction_drawn_like_the_controls_has_a_uniform_p():
    random = np.random.default_rng(5)
    controls = random.normal(size=(4, 2, 999)).astype(np.float32)
    weights, fresh = random.random((300, 4, 2)), random.normal(size=(300, 4, 2))
    observed = np.einsum("frn,frn->f", weights, fresh)
    found = pool.rank_among(observed, weights, controls, np.ones((300, 999), dtype=bool))
    assert abs(np.mean(found.p < 0.1) - 0.1) < 0.05
    assert found.p.min() >= 1 / 1000
    assert (found.low < 0).all()
    assert (found.high > 0).all()


# Files, seeds, bad input


def test_an_atlas_survives_its_files_and_the_same_seed_gives_the_same_bytes(atlas, toy_pair, toy_cache, wide, tmp_path):
    atlas.save(tmp_path / "one")
    atlas_of(toy_pair, toy_cache, wide).save(tmp_path / "two")
    for name in ("atlas.json", "atlas.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    back = load_atlas(tmp_path / "one")
    assert {name: part for name, part in back.record.items() if name != "files"} == atlas.record
    for name, column in atlas.table.items():
        assert np.array_equal(column.astype(str), back.table[name].astype(str)), name


def test_the_table_has_a_row_for_every_alive_feature_and_variant(atlas):
    table = atlas.table
    assert len(table["feature"]) == 4 * atlas.record["alive"]
    assert np.isfinite(table["estimate"]).all()
    measured = table["tested"].astype(bool)
    assert np.isfinite(table["mean"][measured]).all()
    assert np.isnan(table["mean"][~measured]).all()
    row = rows_of(atlas, FEATURE)["upstream"]
    at = (table["feature"] == FEATURE) & (table["variant"] == "upstream")
    assert table["mean"][at] == row["mean"]
    assert table["log_odds"][at] == LOG_ODDS[FEATURE]


def test_a_scan_without_a_specific_feature_has_no_atlas(toy_pair, toy_cache, wide):
    with pytest.raises(InputError, match="no feature of adhd_L2_hook_resid_post is specific to 'adhd'"):
        atlas_of(toy_pair, toy_cache, wide, features=[])


def test_directions_of_many_features_are_those_of_each_alone(wide):
    rows = 2 * torch.randn(400, 16, generator=torch.Generator().manual_seed(2))
    is_onset = np.arange(400) % 3 == 0
    together = feature_directions(wide.sae, list(range(24)), rows, is_onset)
    for feature, found in enumerate(together):
        alone = feature_direction(wide.sae, feature, rows, is_onset)
        assert (found is None) == (alone is None)
        if found is not None:
            value = wide.sae.activation_of(rows, feature).numpy()
            chosen = value[(value > 0) & is_onset] if ((value > 0) & is_onset).sum() >= 50 else value[value > 0]
            assert found.s == alone.s == pytest.approx(float(np.median(chosen)), rel=1e-6)
