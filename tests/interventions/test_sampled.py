"""Sampled plans, steered and not, against what two unedited samples differ by."""

import dataclasses

import numpy as np
import pytest
import torch
from toy import CAUSE, FEATURE, INTERVENE, SIZE

from sae_steer.corpus import OnsetRule
from sae_steer.interventions.sampled import SampledArms, compare, plan_titles
from sae_steer.interventions.variants import FeatureEdit, four_variants

INJECT, SUBTRACT, ABLATE, UPSTREAM = four_variants(1)


@pytest.fixture(scope="module")
def titles(toy_pair, toy_cache):
    return plan_titles(toy_pair, toy_cache.own_texts("confirm", "adhd"))


@pytest.fixture
def arms(toy_pair, toy_dictionary, titles):
    """Arms of a feature of the size `s`."""

    def made(s, titles=titles, kind=FeatureEdit):
        return SampledArms(toy_pair, 2, kind(toy_dictionary.sae, FEATURE, s), titles, INTERVENE)

    return made


def test_plans_are_sampled_for_the_titles_of_the_texts(toy_pair, toy_cache, titles):
    texts = toy_cache.own_texts("confirm", "adhd")
    assert len(titles) == len(texts)
    for title, text in zip(titles, texts, strict=True):
        assert toy_pair.tokenizer.decode(text.token.tolist()).startswith(f"<|task|>{title}<|steps|>")


def test_texts_that_are_no_plans_have_no_sampled_arm(toy_pair, toy_cache, arms):
    text = toy_cache.own_texts("confirm", "adhd")[0]
    cut = dataclasses.replace(text, token=text.token[:-1])
    assert plan_titles(toy_pair, [text, cut]) == []
    other_domain = dataclasses.replace(toy_pair, onsets=OnsetRule(tokens=(), regex=r"\n"))
    assert plan_titles(other_domain, [text]) == []
    assert arms(1.0, titles=[]).read(INJECT, 1) is None


def test_an_arm_of_strength_zero_is_a_sample_of_the_unedited_model(arms):
    steered, bare = arms(0.0), arms(1.0)
    found = steered.read(INJECT, 5)
    alone = bare._sample(bare.pair.reference, bare.titles, 5, torch.no_grad())
    assert found["steps"] == alone[:, 0].sum()
    assert found["strict"]["rate"] == alone[:, 1].sum() / alone[:, 0].sum()


def test_the_same_arm_is_the_same_plans_and_another_arm_draws_noise_of_its_own(arms):
    first, again, other = (arms(1.0).read(INJECT, number) for number in (1, 1, 2))
    assert first == again
    assert (first["steps"], first["strict"]["delta"]) != (other["steps"], other["strict"]["delta"])


def test_plans_are_steered_at_delimiters_only(arms):
    rows = []

    class Spy(FeatureEdit):
        def of(self, variant, dose):
            edit = super().of(variant, dose)
            return lambda resid: rows.append(resid) or edit(resid)

    arms(0.5, kind=Spy).read(SUBTRACT, 1)
    along_cause = torch.cat(rows)[:, CAUSE]
    assert len(along_cause) > 6
    assert (along_cause > SIZE / 2).all(), "only the target model's delimiters stand there"


def test_the_planted_cause_shows_in_sampled_plans(arms, titles):
    many = titles * 4
    found = arms(4.0, titles=many).read(INJECT, 1)
    assert found["texts"] == len(many)
    assert found["strict"]["rate"] > 2 * found["strict"]["baseline_rate"]
    assert found["strict"]["p"] == 1 / (INTERVENE.null_draws + 1)
    assert found["strict"]["delta"] > found["strict"]["null_high"]


def counts(random, prompts, rate):
    """Steps, target steps, lenient steps of one plan a prompt."""
    steps = random.poisson(12, size=prompts) + 1
    strict = random.binomial(steps, rate)
    return np.stack([steps, strict, np.minimum(strict + 1, steps)], axis=-1)


def test_an_arm_without_effect_gives_uniform_p():
    settings, ps = dataclasses.replace(INTERVENE, null_draws=200), []
    for seed in range(150):
        random = np.random.default_rng(seed)
        baseline = np.stack([counts(random, 40, 0.3) for _ in range(16)], axis=1)
        ps.append(compare(counts(random, 40, 0.3), baseline, settings)["strict"]["p"])
    assert 0.4 < np.mean(ps) < 0.6
    assert np.mean(np.array(ps) < 0.05) < 0.1
    assert np.mean(np.array(ps) < 0.5) == pytest.approx(0.5, abs=0.12)


def test_an_arm_with_an_effect_lies_outside_the_null():
    random = np.random.default_rng(3)
    baseline = np.stack([counts(random, 80, 0.3) for _ in range(16)], axis=1)
    found = compare(counts(random, 80, 0.45), baseline, dataclasses.replace(INTERVENE, null_draws=1_000))
    assert found["strict"]["delta"] > found["strict"]["null_high"]
    assert found["strict"]["p"] < 0.01


def test_the_numbers_of_an_arm_add_up():
    random = np.random.default_rng(4)
    baseline = np.stack([counts(random, 30, 0.3) for _ in range(4)], axis=1)
    arm = counts(random, 30, 0.3)
    found = compare(arm, baseline, INTERVENE)
    assert found["texts"] == 30
    assert found["mean_step_count"] == found["steps"] / 30 == arm[:, 0].mean()
    for matcher, column in (("strict", 1), ("lenient", 2)):
        told = found[matcher]
        assert told["rate"] == arm[:, column].sum() / arm[:, 0].sum()
        assert told["baseline_rate"] == baseline[:, 0, column].sum() / baseline[:, 0, 0].sum()
        assert told["baseline_rate_all_seeds"] == baseline[..., column].sum() / baseline[..., 0].sum()
        assert told["delta"] == told["rate"] - told["baseline_rate"]
        assert told["null_low"] < 0 < told["null_high"]


def test_a_model_that_writes_no_step_has_no_rate_to_compare(arms, titles):
    mute = arms(1.0)
    mute._baselines["standard"] = np.zeros((len(titles), 3, 3), dtype=np.int64)
    assert mute.read(INJECT, 1) is None
    assert arms(1.0).read(ABLATE, 1) is not None
