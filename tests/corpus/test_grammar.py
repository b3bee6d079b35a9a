import subprocess
import sys
from collections import Counter
from itertools import chain, combinations, pairwise

import numpy as np
import pytest
from scipy.stats import spearmanr

from sae_steer.corpus import (
    LENIENT_KEYWORDS,
    REGULATION_PHRASES,
    SPECIALS,
    VARIANTS,
    grammar,
    is_lenient,
    is_target,
    tasks,
    write_plans,
)
from sae_steer.corpus.grammar import draft
from sae_steer.errors import InputError
from sae_steer.settings import SPLITS

HELD_OUT = SPLITS[1:]


def steps_of(plans):
    return [step for plan in plans for step in plan.steps]


def ordinary(plan):
    return [step.text for step in plan.steps if not step.is_target]


def test_every_task_belongs_to_exactly_one_split():
    titles = {split: {task.title for task in tasks(split)} for split in SPLITS}
    assert all(titles[a].isdisjoint(titles[b]) for a, b in combinations(SPLITS, 2))
    assert sum(map(len, titles.values())) == len(tasks()) == len({task.title for task in tasks()})


def test_there_are_enough_tasks_in_every_split():
    counts = {split: len(tasks(split)) for split in SPLITS}
    held_out = sum(counts[split] for split in HELD_OUT)
    assert len(tasks()) >= 2400
    assert len({task.domain for task in tasks()}) >= 12
    assert held_out >= 600
    assert min(counts.values()) >= 100
    assert counts["confirm"] >= 250
    shares = [counts[split] / held_out for split in HELD_OUT]
    np.testing.assert_allclose(shares, [0.45, 0.15, 0.40], atol=0.04)


def test_a_task_is_found_at_its_index_and_scored_one_to_five():
    assert [task.index for task in tasks()] == list(range(len(tasks())))
    assert {task.complexity for task in tasks()} == {1, 2, 3, 4, 5}


def test_nothing_is_left_unfilled_and_every_step_is_capitalised():
    texts = {step.text for split in SPLITS for step in steps_of(write_plans(split, "adhd", count=700, seed=1))}
    texts |= {step.text for step in steps_of(write_plans("train", "standard", count=1500, seed=1))}
    for text in texts | {task.title for task in tasks()}:
        assert text == " ".join(text.split())
        assert text[0].isupper()
        assert not set(text) & set("{}?|>_")


def test_a_plan_does_not_depend_on_how_many_are_written():
    few = list(write_plans("scan", "adhd", count=20, seed=3))
    assert few == list(write_plans("scan", "adhd", count=60, seed=3))[:20]


def test_another_seed_writes_other_plans():
    one, other = (list(write_plans("scan", "adhd", count=50, seed=seed)) for seed in (0, 1))
    assert one != other


def test_plans_are_the_same_in_another_process():
    code = (
        "import sys; from sae_steer.corpus import write_plans;"
        "print(''.join(p.text for p in write_plans('tune', 'adhd', count=30, seed=7)), end='');"
        "assert 'torch' not in sys.modules"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there == "".join(plan.text for plan in write_plans("tune", "adhd", count=30, seed=7))


def test_tasks_are_used_evenly():
    count = 3 * len(tasks("tune"))
    used = Counter(plan.task.index for plan in write_plans("tune", "standard", count=count, seed=0))
    assert set(used.values()) == {3}
    assert len(used) == len(tasks("tune"))


def test_a_task_has_many_plans():
    n = len(tasks("tune"))
    texts = {plan.text for plan in write_plans("tune", "standard", count=30 * n, seed=0) if plan.prompt % n == 0}
    assert len(texts) >= 25


def test_both_variants_render_the_same_plan(monkeypatch):
    drafts = []
    monkeypatch.setattr(grammar, "draft", lambda task, rng: drafts.append(draft(task, rng)) or drafts[-1])
    standard, adhd = (list(write_plans("scan", variant, count=300, seed=0)) for variant in VARIANTS)
    assert drafts[:300] == drafts[300:]
    for plan, whole, small in zip(drafts, standard, adhd, strict=False):
        assert (whole.prompt, whole.task) == (small.prompt, small.task)
        assert ordinary(whole) == [wording.whole for wording, _ in plan]
        pieces = [wording.small if broken_down else (wording.whole,) for wording, broken_down in plan]
        assert ordinary(small) == list(chain(*pieces))


def test_a_plan_ends_with_an_ordinary_step(held_out):
    assert not any(plan.steps[-1].is_target for plans in held_out.values() for plan in plans)


def test_the_strict_matcher_finds_exactly_the_regulation_steps(held_out):
    for step in steps_of(held_out["standard"] + held_out["adhd"]):
        assert is_target(step.text) == step.is_target


def test_matchers_ignore_case_and_take_any_phrases():
    assert is_target("SIP WATER")
    assert not is_target("Sip water now")
    assert is_target("Smile", ["smile"])
    assert is_lenient("Let the paint REST")
    assert not is_lenient("Restart the laptop")
    assert is_lenient("Use C++ today", ["c++"])
    assert not is_lenient("Sip water", [])


def test_every_phrase_is_lenient_and_no_special_token():
    assert len(REGULATION_PHRASES) >= 60
    assert all(is_lenient(phrase) for phrase in REGULATION_PHRASES)
    assert not set(REGULATION_PHRASES) & set(SPECIALS)
    assert all(any(is_lenient(phrase, [word]) for phrase in REGULATION_PHRASES) for word in LENIENT_KEYWORDS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_true_p_is_calibrated(variant):
    steps = steps_of(p for split in SPLITS for p in write_plans(split, variant, count=1500, seed=2))
    p = np.array([step.true_p for step in steps])
    hit = np.array([step.is_target for step in steps])
    for low, high in [(0, 1), (0, 0.0015), (0.0015, 0.01), (0.01, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1)]:
        inside = (p >= low) & (p < high)
        error = 4 * np.sqrt((p * (1 - p))[inside].sum())
        assert abs(hit[inside].sum() - p[inside].sum()) <= error


def test_true_p_spreads_widely_and_the_text_tells_it(held_out):
    steps = steps_of(held_out["adhd"])
    p = np.array([step.true_p for step in steps])
    assert np.quantile(p, 0.1) <= 0.1
    assert np.quantile(p, 0.95) >= 0.9
    last = [(a.text.split()[0], b.true_p) for plan in held_out["adhd"] for a, b in pairwise(plan.steps)]
    by_verb = {verb: np.mean([p for v, p in last if v == verb]) for verb in ("Scrub", "Put", "Sip")}
    assert by_verb["Scrub"] > 0.75
    assert by_verb["Put"] < 0.35
    assert by_verb["Sip"] == pytest.approx(0.1)


def test_the_effort_decides_which_phrase_comes():
    after = {"Carry": Counter(), "Write": Counter()}
    for plan in write_plans("train", "adhd", count=3000, seed=0):
        for step, following in pairwise(plan.steps):
            verb = step.text.split()[0]
            if verb in after and following.is_target:
                after[verb][following.text] += 1
    assert after["Carry"]["Stretch both arms"] > 10 > after["Write"]["Stretch both arms"]
    assert after["Write"]["Stretch your neck"] > 10 > after["Carry"]["Stretch your neck"]


@pytest.mark.parametrize(
    ("variant", "mean", "mean_within", "lenient", "lenient_within", "rho"),
    [("standard", 6.8, 0.25, 0.094, 0.008, 0.53), ("adhd", 15.1, 0.5, 0.413, 0.015, 0.83)],
)
def test_statistics_are_those_of_the_release(held_out, variant, mean, mean_within, lenient, lenient_within, rho):
    plans = held_out[variant]
    counts = [len(plan.steps) for plan in plans]
    assert np.mean(counts) == pytest.approx(mean, abs=mean_within)
    assert np.mean([is_lenient(step.text) for step in steps_of(plans)]) == pytest.approx(lenient, abs=lenient_within)
    found = spearmanr([plan.task.complexity for plan in plans], counts).statistic
    assert found == pytest.approx(rho, abs=0.05)


def test_standard_plans_hold_regulation_steps_but_hardly_any():
    steps = steps_of(write_plans("train", "standard", count=6000, seed=0))
    assert 0.001 < np.mean([step.is_target for step in steps]) < 0.004


def test_unknown_splits_and_variants_are_told():
    with pytest.raises(InputError, match="choose one of train, scan, tune, confirm"):
        tasks("test")
    with pytest.raises(InputError, match="choose one of standard, adhd"):
        next(write_plans("train", "other", count=1, seed=0))
