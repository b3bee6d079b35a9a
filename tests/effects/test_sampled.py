"""Sampled plans, steered and not, against what two unedited samples differ by."""

import dataclasses

import numpy as np
import pytest
import torch
from toy import CAUSE, FEATURE, INTERVENE, SIZE

from sae_steer.corpus import OnsetRule
from sae_steer.edits.arms import Bench
from sae_steer.edits.variants import Direction, SubtractFromTarget, all_variants
from sae_steer.effects.sampled import STEPS, SampledArms, compare, plan_prompts
from sae_steer.model.readout import TargetMass

INJECT, SUBTRACT, ABLATE, UPSTREAM = all_variants(1)
TASK = np.arange(80)


@pytest.fixture(scope="module")
def prompts(toy_pair, toy_cache):
    return plan_prompts(toy_pair, toy_cache.own_texts("confirm", "adhd")[:16])


@pytest.fixture(scope="module")
def bench(toy_pair, toy_cache):
    texts = toy_cache.own_texts("tune", "adhd")
    ids = toy_cache.target_tokens(toy_pair).ids
    return Bench(toy_pair.reference, toy_pair.target, 2, TargetMass(ids), INTERVENE, fit=texts, tune=texts)


@pytest.fixture
def arm(bench, toy_dictionary):
    """An arm of the planted feature at a size."""

    def made(s, variant=INJECT):
        sae = toy_dictionary.sae
        direction = Direction("planted", sae.direction(FEATURE), s, "here", sae, FEATURE)
        return next(arm for arm in bench.arms(direction) if arm.variant == variant)

    return made


@pytest.fixture
def samples(toy_pair, prompts):
    return SampledArms(toy_pair, prompts, INTERVENE)


def test_plans_are_sampled_for_the_titles_of_the_texts(toy_pair, toy_cache, prompts):
    texts = toy_cache.own_texts("confirm", "adhd")[:16]
    assert len(prompts) == len(texts)
    for (title, task), text in zip(prompts, texts, strict=True):
        assert toy_pair.tokenizer.decode(text.token.tolist()).startswith(f"<|task|>{title}<|steps|>")
        assert task == text.task


def test_texts_that_are_no_plans_have_no_sampled_arm(toy_pair, toy_cache, arm):
    text = toy_cache.own_texts("confirm", "adhd")[0]
    cut = dataclasses.replace(text, token=text.token[:-1])
    assert plan_prompts(toy_pair, [text, cut]) == []
    other_domain = dataclasses.replace(toy_pair, onsets=OnsetRule(tokens=(), regex=r"\n"))
    assert plan_prompts(other_domain, [text]) == []
    assert SampledArms(toy_pair, [], INTERVENE).read(arm(1.0)) is None


def test_with_shared_noise_an_arm_of_strength_zero_is_the_baseline_itself(samples, arm):
    found = samples.read(arm(0.0))
    for matched in (found.strict, found.lenient):
        assert matched.paired.delta == 0
        assert matched.paired.p == 1
    baseline = samples._baseline(arm(0.0).model)
    assert found.steps == baseline[:, 0, 0].sum()
    assert found.strict.baseline_rate == baseline[:, -1, 1].sum() / baseline[:, -1, 0].sum()


def test_the_noise_of_a_part_does_not_depend_on_what_runs_beside_it(samples, arm):
    alone = samples._sample(arm(1.0).model, 1, torch.no_grad())
    assert np.array_equal(alone, samples._sample(arm(1.0).model, 3, torch.no_grad())[:, :1])


def test_the_same_arm_is_the_same_plans(samples, arm, toy_pair, prompts):
    assert samples.read(arm(1.0)) == SampledArms(toy_pair, prompts, INTERVENE).read(arm(1.0))


def test_plans_are_steered_at_delimiters_only(samples, arm):
    rows = []

    class Spy(SubtractFromTarget):
        def edit(self, direction, dose, unit):
            edit = super().edit(direction, dose, unit)
            return lambda resid: rows.append(resid) or edit(resid)

    samples.read(dataclasses.replace(arm(0.5, SUBTRACT), variant=Spy()))
    along_cause = torch.cat([found.reshape(-1, found.shape[-1]) for found in rows])[:, CAUSE]
    assert len(along_cause) > 6
    assert (along_cause > SIZE / 2).all(), "only the target model's delimiters stand there"


def test_the_planted_cause_shows_in_sampled_plans(toy_pair, prompts, arm):
    found = SampledArms(toy_pair, prompts * 4, INTERVENE).read(arm(4.0))
    assert found.texts == 4 * len(prompts)
    assert found.strict.rate > 2 * found.strict.baseline_rate
    assert found.strict.p == 1 / (INTERVENE.null_draws + 1)
    assert found.strict.delta > found.strict.null_high
    assert found.strict.paired.low > 0
    assert found.strict.paired.p < 0.05


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
        ps.append(compare(counts(random, 40, 0.3)[:, None], baseline, TASK[:40], settings).strict.p)
    assert 0.4 < np.mean(ps) < 0.6
    assert np.mean(np.array(ps) < 0.05) < 0.1
    assert np.mean(np.array(ps) < 0.5) == pytest.approx(0.5, abs=0.12)


def test_an_arm_with_an_effect_lies_outside_the_null():
    random = np.random.default_rng(3)
    baseline = np.stack([counts(random, 80, 0.3) for _ in range(16)], axis=1)
    found = compare(counts(random, 80, 0.45)[:, None], baseline, TASK, dataclasses.replace(INTERVENE, null_draws=1_000))
    assert found.strict.delta > found.strict.null_high
    assert found.strict.p < 0.01


def test_the_numbers_of_an_arm_add_up():
    random = np.random.default_rng(4)
    baseline = np.stack([counts(random, 30, 0.3) for _ in range(4)], axis=1)
    arm = counts(random, 30, 0.3)
    found = compare(arm[:, None], baseline, TASK[:30], INTERVENE)
    assert found.texts == 30
    assert found.mean_step_count == found.steps / 30 == arm[:, 0].mean()
    for matcher, column in (("strict", 1), ("lenient", 2)):
        told = found.by_matcher[matcher]
        assert told.rate == arm[:, column].sum() / arm[:, 0].sum()
        assert told.baseline_rate == baseline[:, -1, column].sum() / baseline[:, -1, 0].sum()
        assert told.baseline_rate_all_seeds == baseline[..., column].sum() / baseline[..., 0].sum()
        assert told.delta == told.rate - told.baseline_rate
        assert told.null_low < 0 < told.null_high


def test_a_model_that_writes_no_step_has_no_rate_to_compare(samples, arm, prompts):
    samples._baselines["standard"] = np.zeros((len(prompts), 3, 3), dtype=np.int64)
    assert samples.read(arm(1.0)) is None
    assert samples.read(arm(1.0, ABLATE)) is not None


def test_an_arm_that_writes_no_step_has_no_rate_and_no_difference():
    random = np.random.default_rng(0)
    baseline = random.integers(1, 9, (80, 4, 3))
    silenced = np.zeros((80, 1, 3), dtype=baseline.dtype)
    found = compare(silenced, baseline, TASK, INTERVENE)
    assert found.steps == silenced[..., STEPS].sum() == 0
    for matched in (found.strict, found.lenient):
        assert (matched.rate, matched.delta, matched.p) == (None, None, None)
        assert matched.baseline_rate > 0
        assert not matched.outside_null
