"""One feature's study, on a toy pair in which feature 7 is the cause and on what cannot be studied."""

import dataclasses

import numpy as np
import pytest
import torch
from toy import CACHE, CORPUS, FEATURE, INTERVENE, toy_sae, write_toy_pair

from sae_steer import stats
from sae_steer.cache import cache_activations
from sae_steer.dictionary import Dictionary
from sae_steer.errors import InputError, NotDeliveredError
from sae_steer.interventions.bench import choose_onsets
from sae_steer.interventions.study import RECORD_FILE, TRIALS_FILE, intervene, load_study
from sae_steer.interventions.variants import FeatureEdit, four_variants
from sae_steer.pair.model_pair import load_pair
from sae_steer.pair.texts import GeneratedTexts

EXACT = dataclasses.replace(INTERVENE, generations=0)
SILENT = 23


@pytest.fixture(scope="module")
def study(toy_pair, toy_cache, toy_dictionary):
    return intervene(toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=INTERVENE)


@pytest.fixture(scope="module")
def saved(study, tmp_path_factory):
    """The study as its files give it back."""
    folder = tmp_path_factory.mktemp("study")
    study.save(folder)
    return load_study(folder)


def rows_of(study, variant, mode, dose):
    trials = study.trials
    wanted = (trials["variant"] == variant) & (trials["mode"] == mode) & (trials["dose"] == dose)
    return {name: column[wanted] for name, column in trials.items()}


def doses_of(study):
    """(variant, mode, the record's row) of every dose."""
    for variant in study.record["variants"]:
        for mode in ("single", "joint"):
            for row in variant[mode]["doses"]:
                yield variant["variant"], mode, row


def test_the_planted_cause_moves_the_measure_as_predicted_and_beyond_every_random_direction(study):
    assert study.tested
    for variant in study.record["variants"]:
        for mode in ("single", "joint"):
            at = next(row for row in variant[mode]["doses"] if row["dose"] == 1.0)
            assert variant["predicted_sign"] * at["mean"] > 0.01
            assert variant["predicted_sign"] * at["low"] > 0
            assert variant["predicted_sign"] * at["share"] > 0.1
    inject = study.record["variants"][0]["controls"]
    assert inject["rank_p"] == 1 / (INTERVENE.controls + 1)
    assert len(inject["means"]) == inject["count"] == INTERVENE.controls
    assert inject["low"] <= np.median(inject["means"]) <= inject["high"]


def test_dose_zero_changes_nothing_and_larger_doses_move_more(study):
    for name, mode, row in doses_of(study):
        found = rows_of(study, name, mode, row["dose"])
        if row["dose"] == 0:
            assert np.array_equal(found["p_base"], found["p_edited"])
            assert row["mean"] == row["mean_delivered_norm"] == row["rows_edited"] == 0
            assert row["mean_where_edited"] is None
        else:
            smaller = rows_of(study, name, mode, row["dose"] - 1)
            assert (found["delivered_norm"] >= smaller["delivered_norm"]).all()


def test_the_gap_is_the_difference_of_the_models_at_the_same_onsets(study, toy_pair, toy_cache):
    texts = {text.prompt: text for text in toy_cache.own_texts("confirm", "adhd")}
    columns = list(toy_cache.target_tokens(toy_pair).ids)
    rows = rows_of(study, "inject", "single", 1.0)
    gaps = []
    for prompt, position in zip(rows["prompt"], rows["position"], strict=True):
        tokens = torch.from_numpy(texts[prompt].token.astype(np.int64))[None]
        masses = [m.decoder(tokens)[0, position].double().softmax(-1)[columns].sum() for m in toy_pair.models]
        gaps.append(float(masses[1] - masses[0]))
    assert study.record["gap"]["single"]["mean"] == pytest.approx(np.mean(gaps), abs=1e-6)
    share = next(row["share"] for row in study.record["variants"][0]["single"]["doses"] if row["dose"] == 1.0)
    assert share == pytest.approx((rows["p_edited"] - rows["p_base"]).sum() / np.sum(gaps), rel=1e-3)


def test_all_variants_read_the_same_onsets(study):
    for mode in ("single", "joint"):
        first = rows_of(study, "inject", mode, 1.0)
        for variant in study.record["variants"][1:]:
            other = rows_of(study, variant["variant"], mode, 1.0)
            for name in ("prompt", "task", "position", "next_is_target"):
                assert np.array_equal(first[name], other[name])


def test_the_trials_agree_with_the_record(saved):
    for name, mode, row in doses_of(saved):
        found = rows_of(saved, name, mode, row["dose"])
        effect = found["p_edited"] - found["p_base"]
        assert row["n"] == len(effect)
        assert row["tasks"] == len(np.unique(found["task"]))
        assert row["mean"] == pytest.approx(effect.mean(), abs=1e-12)
        assert row["rows_edited"] == (found["delivered_norm"] > 0).sum()
        assert row["mean_delivered_norm"] == pytest.approx(found["delivered_norm"].mean())
        by_prompt = [effect[found["prompt"] == prompt].mean() for prompt in np.unique(found["prompt"])]
        assert row["prompt_weighted"] == pytest.approx(np.mean(by_prompt), abs=1e-12)
        assert saved.record["baseline"][mode][name] == pytest.approx(found["p_base"].mean())


def test_intervals_resample_tasks(saved):
    for name, mode, row in doses_of(saved):
        found = rows_of(saved, name, mode, row["dose"])
        effect = found["p_edited"] - found["p_base"]
        again = stats.cluster_bootstrap(effect[:, None], found["task"], draws=INTERVENE.bootstrap_draws, seed=0)
        assert (row["low"], row["high"]) == pytest.approx((again.low[0], again.high[0]))
        assert row["low"] <= row["mean"] <= row["high"]


def test_the_delivered_length_is_the_dose_times_s(study):
    s = study.record["firings"]["s"]
    for name in ("inject", "subtract", "upstream"):
        for mode in ("single", "joint"):
            for dose in (1.0, 2.0):
                np.testing.assert_allclose(rows_of(study, name, mode, dose)["delivered_norm"], dose * s, rtol=1e-3)


def test_s_is_the_median_contribution_at_active_onsets_of_the_tune_split(study, toy_cache, toy_dictionary):
    labels = toy_cache.labels("tune")
    own = labels["is_onset"].astype(bool) & (labels["text_variant"] == toy_cache.variants.index("adhd"))
    rows = toy_cache.rows("adhd", 2, "tune").take(np.flatnonzero(own))
    active = toy_dictionary.sae.activation_of(rows, FEATURE)
    active = active[active > 0]
    firings = study.record["firings"]
    assert firings["s"] == pytest.approx(float(active.median()), rel=1e-3)
    assert firings["s_from"] == f"{len(active)} active onsets of the tune split"
    assert 0 < firings["s_share_of_resid_norm"] < 1


def test_zero_ablation_tells_its_coverage_and_the_effect_where_the_feature_fires(toy_pair, toy_cache, toy_dictionary):
    sae = toy_sae(k=24)
    values = sae.activation_of(toy_cache.rows("adhd", 2, "confirm").take(np.arange(2_000)), FEATURE)
    sae.b_enc[FEATURE] -= float(values[values > 0].median())  # fires at about half of the onsets now
    rarer = dataclasses.replace(toy_dictionary, sae=sae)
    study = intervene(toy_pair, rarer, feature=FEATURE, cache=toy_cache, settings=EXACT)
    row = next(
        row for name, mode, row in doses_of(study) if (name, mode, row["dose"]) == ("zero_ablate", "single", 1.0)
    )
    found = rows_of(study, "zero_ablate", "single", 1.0)
    moved = found["delivered_norm"] > 0
    assert 0 < row["coverage"] == moved.mean() < 0.9
    assert row["mean"] == pytest.approx(row["coverage"] * row["mean_where_edited"])
    assert np.array_equal(found["p_edited"][~moved], found["p_base"][~moved])


def test_onsets_are_drawn_by_seed_within_each_text(toy_cache):
    texts = toy_cache.own_texts("confirm", "adhd")
    first, again = (choose_onsets(texts, EXACT) for _ in range(2))
    other = choose_onsets(texts, dataclasses.replace(EXACT, seed=1))
    assert np.array_equal(first["single"].position, again["single"].position)
    assert not np.array_equal(first["single"].position, other["single"].position)
    assert np.array_equal(first["joint"].position, other["joint"].position)
    onsets = {text.prompt: set(np.flatnonzero(text.is_onset)) for text in texts}
    for mode in ("single", "joint"):
        rows = list(zip(first[mode].prompt, first[mode].position, strict=True))
        assert len(set(rows)) == len(rows)
        assert all(position in onsets[prompt] for prompt, position in rows)
    _, counts = np.unique(first["single"].prompt, return_counts=True)
    assert (counts <= EXACT.onsets_per_prompt).all()
    assert len(first["joint"]) == sum(map(len, onsets.values()))


def test_the_same_seed_gives_the_same_files(study, toy_pair, toy_cache, toy_dictionary, tmp_path):
    again = intervene(toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=INTERVENE)
    for folder, made in (("a", study), ("b", again)):
        made.save(tmp_path / folder)
    for name in (RECORD_FILE, TRIALS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_study_survives_save_and_load_unchanged(study, saved):
    assert saved.record == study.record
    assert saved.trials.keys() == study.trials.keys()
    for name, column in study.trials.items():
        assert np.array_equal(saved.trials[name], column)
    assert saved.table() == study.table()
    assert saved.verdict is None


def test_the_record_says_that_an_index_belongs_to_its_dictionary(study):
    assert "feature 7 of this one is not feature 7 of any other" in study.record["note"]
    assert study.record["dictionary_sha256"] in study.record["provenance"]["inputs"].values()


def test_a_feature_with_too_few_firings_is_not_tested_and_the_counts_are_told(
    study, toy_pair, toy_cache, toy_dictionary, tmp_path
):
    sae = toy_sae()
    sae.b_enc[SILENT] = -1e6
    silent = dataclasses.replace(toy_dictionary, sae=sae)
    untested = intervene(toy_pair, silent, feature=SILENT, cache=toy_cache, settings=EXACT)
    assert not untested.tested
    assert untested.record["firings"]["onsets"] == untested.record["firings"]["tasks"] == 0
    assert untested.record["firings"]["s"] is None
    assert "fires at 0 onsets of 0 tasks" in untested.table()
    study.save(tmp_path)
    untested.save(tmp_path)
    assert not (tmp_path / TRIALS_FILE).exists(), "the trials of the study before must not stay"
    assert load_study(tmp_path).record == untested.record


def test_firings_count_among_the_prompts_that_are_read(toy_pair, toy_cache, toy_dictionary):
    few = dataclasses.replace(EXACT, prompts=3)
    study = intervene(toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=few)
    assert not study.tested
    assert study.record["firings"]["tasks"] <= 3
    assert "a test needs 10 onsets of 5 tasks" in study.record["reason"]


@pytest.mark.parametrize("feature", [-1, 24])
def test_an_index_outside_the_dictionary_is_refused(toy_pair, toy_cache, toy_dictionary, feature):
    with pytest.raises(InputError, match=f"feature {feature} is not in this dictionary; it has features 0 to 23"):
        intervene(toy_pair, toy_dictionary, feature=feature, cache=toy_cache, settings=EXACT)


def refused(toy_pair, toy_cache, dictionary, match, settings=EXACT):
    with pytest.raises(InputError, match=match):
        intervene(toy_pair, dictionary, feature=FEATURE, cache=toy_cache, settings=settings)


def test_a_dictionary_that_does_not_fit_is_refused(toy_pair, toy_cache, toy_dictionary):
    known, reference = toy_dictionary.record, toy_pair.reference.sha256
    other = dataclasses.replace(toy_dictionary, record={**known, "model_sha256": "1" * 64})
    refused(toy_pair, toy_cache, other, "another model called 'adhd'")
    of_reference = dataclasses.replace(
        toy_dictionary, model="standard", record={**known, "model": "standard", "model_sha256": reference}
    )
    refused(toy_pair, toy_cache, of_reference, "interventions take one of the target model 'adhd'")
    refused(
        toy_pair, toy_cache, dataclasses.replace(toy_dictionary, model="other"), "this cache holds standard and adhd"
    )
    refused(toy_pair, toy_cache, dataclasses.replace(toy_dictionary, layer=3), "layer")
    wide = Dictionary(
        type(toy_dictionary.sae)(dataclasses.replace(toy_dictionary.sae.config, d_in=20)), "adhd", 2, known, ""
    )
    refused(toy_pair, toy_cache, wide, "reads 20 dimensions and model 'adhd' has 16")


def test_settings_that_cannot_be_met_are_refused(toy_pair, toy_cache, toy_dictionary):
    for upstream in (0, 3):
        settings = dataclasses.replace(EXACT, upstream=upstream)
        refused(toy_pair, toy_cache, toy_dictionary, f"cannot inject {upstream} layers upstream of layer 2", settings)
    settings = dataclasses.replace(EXACT, primary_dose=3.0)
    refused(toy_pair, toy_cache, toy_dictionary, "the primary dose 3.0 is not among the doses", settings)


def test_a_cache_of_another_pair_is_refused(pair, toy_cache, toy_dictionary):
    refused(pair, toy_cache, toy_dictionary, "was written from another pair than 'small'")


def test_a_pair_of_one_model_has_no_gap_to_share(toy_dictionary, tmp_path):
    same = load_pair(write_toy_pair(tmp_path / "same", size=0.0))
    cache = cache_activations(
        same, layers=(1, 2), out=tmp_path / "cache", settings=CACHE, source=GeneratedTexts(CORPUS)
    )
    sae = toy_sae()
    sae.b_enc[FEATURE] = 1.0
    record = {**toy_dictionary.record, "model_sha256": same.target.sha256}
    dictionary = dataclasses.replace(toy_dictionary, sae=sae, record=record)
    study = intervene(same, dictionary, feature=FEATURE, cache=cache, settings=EXACT)
    assert study.record["gap"]["single"]["mean"] == 0
    assert all(row["share"] is None for _, _, row in doses_of(study))
    assert "n/a" in study.table()


def test_an_edit_that_reaches_no_onset_is_an_error(toy_pair, toy_cache, toy_dictionary, monkeypatch):
    def nothing(self, variant, dose):
        return lambda resid: resid

    monkeypatch.setattr(FeatureEdit, "of", nothing)
    with pytest.raises(NotDeliveredError, match=r"inject \(single\) at dose 1.0 moved the residual stream at none"):
        intervene(toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=EXACT)


def test_progress_runs_from_nothing_to_all(toy_pair, toy_cache, toy_dictionary):
    told = []
    intervene(
        toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=EXACT,
        on_step=lambda done, total, note="": told.append((done, total)),
    )  # fmt: skip
    assert [done for done, _ in told] == list(range(9))
    assert {total for _, total in told} == {8}


def test_the_four_variants_edit_where_the_protocol_says():
    assert [(v.name, v.edits_target, v.layers_below, v.predicted_sign) for v in four_variants(2)] == [
        ("inject", False, 0, +1),
        ("subtract", True, 0, -1),
        ("zero_ablate", True, 0, -1),
        ("upstream", False, 2, +1),
    ]
