"""One study from end to end on a toy pair in which feature 7 is the cause, and on what cannot be studied."""

import dataclasses

import numpy as np
import pytest
import torch
from toy import CACHE, CAUSE, CORPUS, FEATURE, INTERVENE, SIZE, toy_sae, write_toy_pair

from sae_steer import stats
from sae_steer.cache import cache_activations
from sae_steer.dictionary import Dictionary
from sae_steer.edits import controls as families
from sae_steer.edits.arms import Arm
from sae_steer.edits.variants import all_variants
from sae_steer.effects import estimates as effects
from sae_steer.effects import readings
from sae_steer.effects.readings import Onsets
from sae_steer.effects.sampled import MatchedSteps, PairedDifference, SampledArm
from sae_steer.errors import InputError
from sae_steer.pair.model_pair import load_pair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.records import read_json, read_table
from sae_steer.study import protocol
from sae_steer.study.files import RECORD_FILE, TRIALS_FILE, load_study
from sae_steer.study.of_pair import intervene

EXACT = dataclasses.replace(INTERVENE, generations=0, doses=(0.0, 1.0), onsets_per_prompt=1, ribbon=1)
SILENT = 23


@pytest.fixture(scope="module", autouse=True)
def whole_dictionary():
    """The toy dictionary reads the cause and little else; what it loses is the subject of one test alone."""
    from sae_steer.study import of_pair as home

    right = home.ce_recovered
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(home, "ce_recovered", lambda *a, **k: dataclasses.replace(right(*a, **k), recovered=0.97))
        yield


@pytest.fixture(scope="module")
def study(toy_pair, toy_cache, toy_dictionary):
    return intervene(toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=INTERVENE)


@pytest.fixture(scope="module")
def saved(study, tmp_path_factory):
    """The study as its files give it back."""
    folder = tmp_path_factory.mktemp("study")
    study.save(folder)
    return load_study(folder)


def rows_of(study, variant, mode, dose, direction=None):
    """Trials of one cell; the direction is by default the primary one."""
    trials = study.trials
    primary = next(v["direction"] for v in study.record()["variants"] if v["variant"] == variant)
    wanted = (trials["variant"] == variant) & (trials["mode"] == mode) & (trials["dose"] == dose)
    wanted &= trials["direction"] == (direction or primary)
    return {name: column[wanted] for name, column in trials.items()}


def doses_of(study):
    """(variant, mode, the record's row) of every dose."""
    for variant in study.record()["variants"]:
        for mode in ("single", "joint"):
            for row in variant[mode]["doses"]:
                yield variant["variant"], mode, row


NO_DIFFERENCE = PairedDifference(delta=0.0, low=-0.1, high=0.1, p=0.9, plans=10)
MATCHED = MatchedSteps(
    rate=0.3, baseline_rate=0.3, baseline_rate_all_seeds=0.3, delta=0.0, null_low=-0.1, null_high=0.1, null_sd=0.05,
    p=0.9, paired=NO_DIFFERENCE,
)  # fmt: skip
SAMPLED = SampledArm(texts=10, steps=95, mean_step_count=9.5, strict=MATCHED, lenient=MATCHED)


def with_variants(study, variants):
    """The study with other results of its variants."""
    return dataclasses.replace(study, evidence=dataclasses.replace(study.evidence, variants=tuple(variants)))


def gates_of(study):
    """{(variant or all, number): gate}"""
    found = {("all", gate["gate"]): gate for gate in study.record()["gates"]}
    for variant in study.record()["variants"]:
        found |= {(variant["variant"], gate["gate"]): gate for gate in variant["gates"]}
    return found


def test_the_planted_cause_is_causal_in_every_variant_and_every_gate_holds(study):
    assert study.tested
    assert [gate["detail"] for gate in gates_of(study).values() if not gate["passed"]] == []
    assert {v["variant"]: v["verdict"] for v in study.record()["variants"]} == dict.fromkeys(
        ("inject", "subtract", "zero_ablate", "upstream"), "CAUSAL"
    )
    assert study.verdict == "CAUSAL"
    assert study.record()["quick"]
    assert "CAUSAL (quick" in study.table()
    for name, _, row in doses_of(study):
        sign = next(v["predicted_sign"] for v in study.record()["variants"] if v["variant"] == name)
        if row["dose"] == 1.0:
            assert sign * row["low"] > 0.012
            assert sign * row["share"] > 0.1


def test_a_control_family_is_read_at_the_length_delivered_and_ranks_the_edit(study):
    inject = study.record()["variants"][0]
    families = {family["family"]: family for family in inject["controls"]}
    assert {"isotropic", "covariance"} <= set(families)
    for family in families.values():
        assert len(family["means"]) == family["count"]
        assert family["low"] <= np.median(family["means"]) <= family["high"]
    assert families["isotropic"]["rank_p"] == 1 / (INTERVENE.controls + 1)
    assert inject["single"]["tests"]["specific_p"] == max(f["rank_p"] for f in families.values() if f["ranked"])


def test_dose_zero_changes_nothing_and_larger_doses_move_more(study):
    for name in ("inject", "subtract", "zero_ablate", "upstream"):
        for mode in ("single", "joint"):
            found = {dose: rows_of(study, name, mode, dose) for dose in (0.0, 1.0, 2.0)}
            assert np.array_equal(found[0.0]["p_base"], found[0.0]["p_edited"])
            assert not found[0.0]["delivered_norm"].any()
            assert found[1.0]["delivered_norm"].mean() < found[2.0]["delivered_norm"].mean()


def test_the_gap_is_the_difference_of_the_models_at_the_same_onsets(study, toy_pair, toy_cache):
    texts = {text.prompt: text for text in toy_cache.own_texts("confirm", "adhd")}
    columns = list(toy_cache.target_tokens(toy_pair).ids)
    rows = rows_of(study, "inject", "single", 1.0)
    gaps = []
    for prompt, position in zip(rows["prompt"], rows["position"], strict=True):
        tokens = torch.from_numpy(texts[prompt].token.astype(np.int64))[None]
        masses = [m.model(tokens)[0, position].double().softmax(-1)[columns].sum() for m in toy_pair.models]
        gaps.append(float(masses[1] - masses[0]))
    assert study.record()["gap"]["single"]["mean"] == pytest.approx(np.mean(gaps), abs=1e-6)
    share = next(row["share"] for row in study.record()["variants"][0]["single"]["doses"] if row["dose"] == 1.0)
    assert share == pytest.approx((rows["p_edited"] - rows["p_base"]).sum() / np.sum(gaps), rel=1e-3)


def test_all_variants_read_the_same_onsets(study):
    for mode in ("single", "joint"):
        first = rows_of(study, "inject", mode, 1.0)
        for variant in study.record()["variants"][1:]:
            other = rows_of(study, variant["variant"], mode, 1.0)
            for name in ("prompt", "task", "position", "next_is_target"):
                assert np.array_equal(first[name], other[name])


def test_the_trials_agree_with_the_record(saved):
    for name, mode, row in doses_of(saved):
        found = rows_of(saved, name, mode, row["dose"])
        effect = found["p_edited"] - found["p_base"]
        assert row["n"] == len(effect)
        assert row["tasks"] == len(np.unique(found["task"]))
        assert row["mean"] == pytest.approx(effect.mean(), abs=1e-9)
        assert row["rows_edited"] == (found["delivered_norm"] > 0).sum()
        assert row["kl"] == pytest.approx(found["kl"].mean())
        others = found["off_target_nats_change"]
        assert np.isnan(others).any()
        assert row["off_target_nats"] == pytest.approx(np.nanmean(others))


def test_the_trials_of_control_directions_agree_with_the_record(study, tmp_path):
    study.save(tmp_path)
    for variant in study.record()["variants"]:
        single = [("single", family, variant["single"]["n"]) for family in variant["controls"]]
        joint = [("joint", family, variant["joint_controls"]["n"]) for family in variant["joint_controls"]["families"]]
        for mode, family, n in single + joint:
            where = {"variant": variant["variant"], "mode": mode, "family": family["family"]}
            found = read_table(tmp_path / TRIALS_FILE, where)
            effect = (found["p_edited"] - found["p_base"]).reshape(family["count"], n)  # direction by direction
            np.testing.assert_allclose(effect.mean(axis=1), family["means"], atol=1e-12)
            assert len(set(found["direction"].tolist())) == family["count"]
            edit = rows_of(study, variant["variant"], "single", 1.0)
            if mode == "single":
                for name in ("prompt", "task", "position", "next_is_target", "p_base", "delivered_norm"):
                    assert np.array_equal(found[name][-n:], edit[name])


def test_intervals_resample_tasks(saved):
    found = rows_of(saved, "inject", "single", 1.0)
    row = next(row for name, mode, row in doses_of(saved) if (name, mode, row["dose"]) == ("inject", "single", 1.0))
    effect = found["p_edited"] - found["p_base"]
    again = stats.cluster_bootstrap(effect[:, None], found["task"], draws=INTERVENE.bootstrap_draws, seed=0)
    assert (row["low"], row["high"]) == pytest.approx((again.low[0], again.high[0]))


def test_the_delivered_length_is_the_dose_times_s(study):
    s = study.record()["firings"]["s"]
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
    firings = study.record()["firings"]
    assert firings["s"] == pytest.approx(float(active.median()), rel=1e-3)
    assert firings["s_from"] == f"{len(active)} active onsets of the tune split"


def test_onsets_are_drawn_by_seed_within_each_text(toy_cache):
    texts = toy_cache.own_texts("confirm", "adhd")
    first, again = (Onsets.of(texts, EXACT) for _ in range(2))
    other = Onsets.of(texts, dataclasses.replace(EXACT, seed=1))
    assert np.array_equal(first.single.position, again.single.position)
    assert not np.array_equal(first.single.position, other.single.position)
    assert np.array_equal(first.joint.position, other.joint.position)
    _, counts = np.unique(first.single.prompt, return_counts=True)
    assert (counts <= EXACT.onsets_per_prompt).all()
    assert len(first.joint) == sum(int(text.is_onset.sum()) for text in texts)
    assert len(np.unique(first.joint_doses.prompt)) == EXACT.joint_control_prompts


def test_the_same_seed_gives_the_same_files(study, toy_pair, toy_cache, toy_dictionary, tmp_path):
    again = intervene(toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=INTERVENE)
    for folder, made in (("a", study), ("b", again)):
        made.save(tmp_path / folder)
    for name in (RECORD_FILE, TRIALS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_study_survives_save_and_load_unchanged(study, saved):
    assert saved == study
    for name, column in study.trials.items():
        assert np.array_equal(saved.trials[name], column, equal_nan=column.dtype.kind == "f")
    assert saved.table() == study.table()


def test_the_released_records_hold_the_sampled_rates_and_null_for_what_is_not_there(study, tmp_path):
    variants = []
    for number, variant in enumerate(study.variants):
        strict = dataclasses.replace(
            SAMPLED.strict, rate=0.1 * number, baseline_rate=0.05, delta=0.1 * number - 0.05, null_sd=0.02, p=0.5
        )
        arm = dataclasses.replace(SAMPLED, strict=strict, mean_step_count=9.5, steps=95)
        variants.append(dataclasses.replace(variant, sampled=arm))
    with_variants(study, variants).save(tmp_path)
    sampled = {variant.name: dataclasses.asdict(variant.sampled.strict) for variant in variants}
    probes, panels = (read_json(tmp_path / name) for name in ("three_probes.json", "deepdive_steering.json"))
    assert probes["probe_2_zero_ablation"]["delta_step_onset"] == sampled["zero_ablate"]["delta"]
    assert probes["probe_3_L1_steering"]["coef_+1.0"]["regulation_rate"] == sampled["upstream"]["rate"]
    assert panels["panels"]["subtract_from_target"]["steered_reg_rate"] == sampled["subtract"]["rate"]
    split, firings = probes["probe_1_variant_split"], study.firings
    assert split["onsets_adhd"] == firings.of_onsets
    assert split["feat2504_rate_adhd_only_in_adhd_L2"] == firings.onsets / firings.of_onsets > 0.9
    assert split["feat2504_rate_adhd_only_in_std_L2"] == 0.0  # the toy's reference model lacks the cause
    assert (probes["feature"], split["onsets_all"], split["primary_adhd_only"]) == (FEATURE, None, None)
    with_variants(study, [dataclasses.replace(v, sampled=None) for v in variants]).save(tmp_path)
    assert read_json(tmp_path / "three_probes.json")["probe_2_zero_ablation"]["delta_step_onset"] is None


def test_the_record_says_that_an_index_belongs_to_its_dictionary(study):
    assert "feature 7 of this one is not feature 7 of any other" in study.record()["note"]
    assert study.record()["dictionary_sha256"] in study.record()["provenance"]["inputs"].values()


def test_a_feature_that_hardly_fires_is_invalid_with_its_counts(study, toy_pair, toy_cache, toy_dictionary, tmp_path):
    sae = toy_sae()
    sae.b_enc[SILENT] = -1e6
    silent = dataclasses.replace(toy_dictionary, sae=sae)
    untested = intervene(toy_pair, silent, feature=SILENT, cache=toy_cache, settings=EXACT)
    assert not untested.tested
    assert untested.verdict == "INVALID"
    assert untested.record()["firings"]["onsets"] == 0
    assert "fires nowhere in the tune texts" in untested.table()
    study.save(tmp_path)
    untested.save(tmp_path)
    assert not (tmp_path / TRIALS_FILE).exists(), "the trials of the study before must not stay"
    assert load_study(tmp_path) == untested
    strict = dataclasses.replace(EXACT, min_firings=10_000)
    rare = intervene(toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=strict)
    assert rare.verdict == "INVALID"
    assert "a test needs 10000 onsets of 30 tasks" in rare.record()["reason"]


@pytest.mark.parametrize("source", ["random", "mean-difference"])
def test_other_directions_are_judged_without_the_parts_that_need_a_feature(toy_pair, toy_cache, toy_dictionary, source):
    study = intervene(toy_pair, toy_dictionary, direction=source, cache=toy_cache, settings=EXACT)
    assert [v["variant"] for v in study.record()["variants"]] == ["inject", "subtract", "upstream"]
    assert study.record()["firings"] is None
    assert "4" not in {gate["gate"] for gate in study.record()["gates"]}
    assert study.verdict != "CAUSAL"


def test_a_vector_in_a_file_is_judged_by_its_own_length(toy_pair, toy_cache, toy_dictionary, tmp_path):
    np.save(tmp_path / "cause.npy", 1.7 * toy_dictionary.sae.direction(FEATURE).numpy())
    told = []
    study = intervene(
        toy_pair, toy_dictionary, direction=tmp_path / "cause.npy", cache=toy_cache, settings=EXACT,
        on_step=lambda done, total, note="": told.append((done, total)),
    )  # fmt: skip
    assert study.record()["direction"] == "cause"
    assert study.record()["variants"][1]["verdict"] == "CAUSAL"
    np.testing.assert_allclose(rows_of(study, "subtract", "single", 1.0)["delivered_norm"], 1.7, rtol=1e-3)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert (told[0], told[-1]) == ((0, 6), (6, 6))


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
    with pytest.raises(InputError, match="upstream is 0, and takes a whole number of at least 1"):
        dataclasses.replace(EXACT, upstream=0)
    settings = dataclasses.replace(EXACT, upstream=3)
    refused(toy_pair, toy_cache, toy_dictionary, "cannot inject 3 layers upstream of layer 2", settings)
    settings = dataclasses.replace(EXACT, primary_dose=3.0)
    refused(toy_pair, toy_cache, toy_dictionary, "the primary dose 3.0 is not among the doses", settings)
    few = dataclasses.replace(EXACT, prompts=20, min_tasks=5)
    refused(toy_pair, toy_cache, toy_dictionary, "20 tasks; intervals over tasks need 30", few)


def test_texts_without_an_onset_are_refused_in_one_line(toy_cache):
    texts = [
        dataclasses.replace(text, is_onset=np.zeros(len(text), dtype=bool))
        for text in toy_cache.own_texts("confirm", "adhd")[:3]
    ]
    with pytest.raises(InputError, match=r"the 3 confirm texts hold no onset.* check the pair's \[onset\]"):
        Onsets.of(texts, EXACT)


def test_a_cache_of_another_pair_is_refused(pair, toy_cache, toy_dictionary):
    refused(pair, toy_cache, toy_dictionary, "was written from another pair than 'small'")


def test_two_models_that_do_not_differ_are_invalid_by_gate_8(toy_dictionary, tmp_path):
    same = load_pair(write_toy_pair(tmp_path / "same", size=0.0))
    cache = cache_activations(
        same, layers=(1, 2), out=tmp_path / "cache", settings=CACHE, source=GeneratedTexts(CORPUS)
    )
    sae = toy_sae()
    sae.b_enc[FEATURE] = 1.0
    record = {**toy_dictionary.record, "model_sha256": same.target.sha256}
    dictionary = dataclasses.replace(toy_dictionary, sae=sae, record=record)
    study = intervene(same, dictionary, feature=FEATURE, cache=cache, settings=EXACT)
    assert study.record()["gap"]["single"]["mean"] == 0
    assert study.verdict == "INVALID"
    assert not gates_of(study)["all", "8"]["passed"]
    assert all("gate 8" in variant["why"] for variant in study.record()["variants"])


def broken(toy_pair, toy_cache, toy_dictionary, number):
    """The study's verdicts and the failing gates of this number, whatever was broken before."""
    study = intervene(toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=EXACT)
    return study, [
        variant for (variant, gate), found in gates_of(study).items() if gate == number and not found["passed"]
    ]


def test_an_edit_that_is_not_delivered_is_invalid_by_gate_2(toy_pair, toy_cache, toy_dictionary, monkeypatch):
    monkeypatch.setattr(Arm, "edit", lambda self, dose, flavour=None: lambda resid: resid)
    study, failed = broken(toy_pair, toy_cache, toy_dictionary, "2")
    assert failed == ["inject", "subtract", "zero_ablate", "upstream"]
    assert study.verdict == "INVALID"
    assert "gate 2 (delivered as intended): largest deviation 1.0e+00" in study.record()["variants"][0]["why"]


def test_a_batch_that_mixes_its_rows_is_invalid_by_gate_3(toy_pair, toy_cache, toy_dictionary, monkeypatch):
    from sae_steer.model.replay import CleanPass

    right = CleanPass.read_many
    monkeypatch.setattr(CleanPass, "read_many", lambda *given: right(*given).roll(1, 0))
    study, failed = broken(toy_pair, toy_cache, toy_dictionary, "3")
    assert failed == ["inject", "subtract", "zero_ablate", "upstream"]
    assert study.verdict == "INVALID"


def test_a_basis_that_predicts_nothing_is_invalid_by_gate_5(toy_pair, toy_cache, toy_dictionary, monkeypatch):
    from sae_steer.edits import basis as transport

    real = transport.bridge

    def shuffled(x_fit, y_fit, x_test, y_test, device, every):
        order = np.random.default_rng(0).permutation(len(x_test))
        return real(x_fit, y_fit, x_test, 3 * y_test[order] + 50, device, every)

    monkeypatch.setattr("sae_steer.edits.arms.bridge", shuffled)
    study, failed = broken(toy_pair, toy_cache, toy_dictionary, "5")
    assert failed == ["inject", "upstream"]
    assert {v["variant"] for v in study.record()["variants"] if v["verdict"] == "INVALID"} == {"inject", "upstream"}


def test_a_measure_that_no_positive_control_moves_is_invalid_by_gate_6a(
    toy_pair, toy_cache, toy_dictionary, monkeypatch
):
    from sae_steer.edits.edit import Patch

    own = toy_pair.reference.model

    def nothing_new(self, tokens):
        return own.resid_posts(tokens, (self.donor.layer,))[self.donor.layer]

    monkeypatch.setattr(Patch, "stream", nothing_new)
    study, failed = broken(toy_pair, toy_cache, toy_dictionary, "6a")
    assert "inject" in failed
    assert study.record()["variants"][0]["verdict"] == "INVALID"


def test_a_dose_zero_that_moves_is_invalid_by_gate_1(toy_pair, toy_cache, toy_dictionary, monkeypatch):
    right = Arm.edit
    monkeypatch.setattr(Arm, "edit", lambda self, dose, flavour=None: right(self, dose + 1e-3, flavour))
    study, failed = broken(toy_pair, toy_cache, toy_dictionary, "1")
    assert failed == ["inject", "subtract", "zero_ablate", "upstream"]
    assert study.verdict == "INVALID"


def test_a_dictionary_that_loses_the_predictions_is_invalid_by_gate_4(toy_pair, toy_cache, toy_dictionary, monkeypatch):
    from sae_steer.study import of_pair as home

    right = home.ce_recovered
    monkeypatch.setattr(home, "ce_recovered", lambda *a, **k: dataclasses.replace(right(*a, **k), recovered=0.41))
    study, failed = broken(toy_pair, toy_cache, toy_dictionary, "4")
    assert failed == ["all"]
    assert study.verdict == "INVALID"
    assert "recovers 0.410 of the cross-entropy at onsets, under 0.80" in study.record()["variants"][0]["why"]


def test_fresh_directions_that_come_out_causal_forbid_causal(toy_pair, toy_cache, toy_dictionary, monkeypatch):
    right = Arm.fan
    cause = toy_dictionary.sae.direction(FEATURE)

    def contaminated(self, settings):
        fan, places = right(self, settings)
        directions = fan.directions.clone()
        for name, _, where in places:
            if name == "fresh":
                directions[where] = self.variant.predicted_sign * cause
        return dataclasses.replace(fan, directions=directions), places

    monkeypatch.setattr(Arm, "fan", contaminated)
    study, failed = broken(toy_pair, toy_cache, toy_dictionary, "7")
    assert "inject" in failed
    assert study.record()["variants"][0]["verdict"] == "NON-SPECIFIC"


def test_joint_controls_are_read_in_full_only_where_the_verdict_turns_on_them(
    toy_pair, toy_cache, toy_dictionary, monkeypatch
):
    counts = []
    right = protocol.read_joint_controls
    monkeypatch.setattr(protocol, "read_joint_controls", lambda *a: counts.append(a[0].variant.name) or right(*a))
    monkeypatch.setattr(protocol.effects, "worst_rank", lambda records: 1.0)  # no single effect is specific
    study = intervene(toy_pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=EXACT)
    assert counts
    assert {v["verdict"] for v in study.record()["variants"] if v["variant"] in counts} <= {
        "NON-SPECIFIC",
        "INCONCLUSIVE",
    }


def test_joint_controls_stop_being_read_once_no_more_of_them_could_make_the_edit_special(
    toy_pair, toy_cache, toy_dictionary, monkeypatch
):
    cause, other = torch.eye(toy_pair.target.model.shape.d_model)[[CAUSE, CAUSE + 3]]
    half = SIZE * (cause + other)  # what goes along the cause alone goes further
    monkeypatch.setattr(families, "isotropic", lambda count, *a: cause.repeat(count, 1))
    monkeypatch.setattr(readings, "ROUND", 5)

    def joint_families():
        made = intervene(toy_pair, toy_dictionary, direction=half, cache=toy_cache, settings=EXACT)
        inject = made.record()["variants"][0]
        found = {family["family"]: family for family in inject["joint_controls"]["families"]}
        return found, [variant["verdict"] for variant in made.record()["variants"]]

    stopped, verdicts = joint_families()
    monkeypatch.setattr(effects, "least_rank", lambda *a: 0.0)
    whole, verdicts_of_all = joint_families()
    assert verdicts == verdicts_of_all
    assert verdicts[0] == "NON-SPECIFIC"
    for family in ("isotropic", "covariance"):
        few, every = stopped[family], whole[family]
        assert (few["count"], few["planned"], every["count"]) == (5, EXACT.controls, EXACT.controls)
        assert few["means"] == every["means"][:5]
    assert stopped["isotropic"]["ranked"]
    assert stopped["isotropic"]["rank_p"] > 0.05


@pytest.mark.parametrize("read", [0, 5, 198, 199])
def test_the_least_rank_is_that_of_a_family_whose_others_do_nothing(read):
    means = np.random.default_rng(3).normal(size=199)
    others = np.concatenate([means[:read], np.full(199 - read, 1e-9)])
    assert effects.least_rank(0.5, means[:read], 199) == stats.rank_p(0.5, others) <= stats.rank_p(0.5, means)


def test_only_a_family_that_is_ranked_can_end_the_reading():
    settings = dataclasses.replace(INTERVENE, controls=199)
    near, far = np.full(50, 0.1), np.full(50, 0.9)
    whole, few = {"isotropic": 199, "matched features": 199}, {"isotropic": 199, "matched features": 60}
    assert effects.is_outranked(0.5, {"isotropic": near, "matched features": far}, whole, settings)
    assert not effects.is_outranked(0.5, {"isotropic": near, "matched features": far}, few, settings)
    assert not effects.is_outranked(0.5, {"isotropic": near, "matched features": near}, whole, settings)
    assert not effects.is_outranked(0.5, {"isotropic": far[:8], "matched features": near}, whole, settings)


def test_positive_controls_that_move_nothing_fail_gate_6b(toy_pair, toy_cache, toy_dictionary, monkeypatch):
    from sae_steer.edits.arms import Bench

    idle = torch.eye(toy_pair.target.model.shape.d_model)[CAUSE + 3]
    monkeypatch.setattr(Bench, "_positives", lambda *a: {"mean difference": idle})
    study, failed = broken(toy_pair, toy_cache, toy_dictionary, "6b")
    assert failed == ["inject", "upstream"], "less of the stream leaves the final norm more of the cause: subtract"
    verdicts = {variant["variant"]: variant["verdict"] for variant in study.record()["variants"]}
    assert verdicts["inject"] == "CAUSAL", "the edit itself shows that something of this size moves the model"


def test_the_all_variants_edit_where_the_protocol_says():
    assert [(v.name, v.edits_target, v.layers_below, v.predicted_sign) for v in all_variants(2)] == [
        ("inject", False, 0, +1),
        ("subtract", True, 0, -1),
        ("zero_ablate", True, 0, -1),
        ("upstream", False, 2, +1),
    ]
