"""The rules of the verdict, the first that holds."""

import pytest

from sae_steer.study.gates import Gate
from sae_steer.study.verdict import ModeTests, Verdict, judge, judge_study, listed

GATES = [Gate(number, "a gate", True, "seen") for number in ("1", "2", "3", "4", "5", "6a", "6b", "7", "8")]
INSIDE = ModeTests(1.0, 1.0, inside=True, specific_p=0.5)
ABOVE = ModeTests(0.001, 1.0, inside=False, specific_p=0.005)
BELOW = ModeTests(1.0, 0.001, inside=False, specific_p=0.005)
COMMON = ModeTests(0.001, 1.0, inside=False, specific_p=0.2)
BETWEEN = ModeTests(0.4, 1.0, inside=False, specific_p=0.005)
UNRANKED = ModeTests(0.001, 1.0, inside=False, specific_p=None)
FEW_TASKS = ModeTests(1.0, 1.0, inside=False, specific_p=0.5, inside_but_few=True)


def verdict(single, joint, *failing, sign=1):
    gates = [Gate(g.number, g.name, g.number not in failing, g.detail) for g in GATES]
    return judge(sign, {"single": single, "joint": joint}, gates, needs="about 900 onsets of 300 tasks would decide")


@pytest.mark.parametrize(
    ("single", "joint", "sign", "expected"),
    [
        (INSIDE, INSIDE, 1, "NULL"),
        (INSIDE, BETWEEN, 1, "INCONCLUSIVE"),
        (ABOVE, ABOVE, 1, "CAUSAL"),
        (BELOW, BELOW, -1, "CAUSAL"),
        (INSIDE, ABOVE, 1, "CAUSAL"),
        (BELOW, INSIDE, 1, "OPPOSITE"),
        (ABOVE, BELOW, 1, "CAUSAL"),
        (COMMON, COMMON, 1, "NON-SPECIFIC"),
        (COMMON, ABOVE, 1, "CAUSAL"),
        (UNRANKED, INSIDE, 1, "INCONCLUSIVE"),
        (UNRANKED, UNRANKED, 1, "INCONCLUSIVE"),
        (COMMON, UNRANKED, 1, "NON-SPECIFIC"),
        (FEW_TASKS, FEW_TASKS, 1, "INCONCLUSIVE"),
        (BETWEEN, INSIDE, 1, "INCONCLUSIVE"),
    ],
)
def test_the_first_rule_that_holds_is_the_verdict(single, joint, sign, expected):
    assert verdict(single, joint, sign=sign).name == expected


@pytest.mark.parametrize("gate", ["1", "2", "3", "4", "5", "6a", "8"])
@pytest.mark.parametrize("tests", [INSIDE, ABOVE])
def test_a_failing_gate_invalidates_whatever_the_effect_and_is_named(gate, tests):
    found = verdict(tests, tests, gate)
    assert found.name == "INVALID"
    assert f"gate {gate}" in found.why


def test_a_null_needs_something_of_this_size_that_moves_the_model():
    assert verdict(INSIDE, INSIDE, "6b").name == "INCONCLUSIVE"
    assert "nothing of this size moves this model" in verdict(INSIDE, INSIDE, "6b").why
    assert verdict(ABOVE, ABOVE, "6b").name == "CAUSAL", "the edit itself shows that something of this size moves it"


def test_without_calibrated_controls_nothing_is_causal():
    assert verdict(ABOVE, ABOVE, "7").name == "NON-SPECIFIC"
    assert verdict(BELOW, BELOW, "7").name == "NON-SPECIFIC"
    assert verdict(INSIDE, INSIDE, "7").name == "NULL"


def test_too_few_controls_are_not_said_to_go_as_far_but_say_how_many_it_takes():
    why = verdict(UNRANKED, INSIDE).why
    assert "go as far" not in why.replace("goes as far", "")
    assert "set controls to so many or more" in why
    assert "from 19 on" in why


def test_an_interval_inside_the_bound_on_too_few_tasks_is_not_said_to_straddle_it():
    assert "lies inside the bound, but on fewer than the 100 tasks" in verdict(FEW_TASKS, FEW_TASKS).why
    assert "straddles" in verdict(FEW_TASKS, BETWEEN).why


def test_an_interval_that_straddles_the_bound_says_what_it_would_take():
    assert "about 900 onsets of 300 tasks" in verdict(BETWEEN, BETWEEN).why


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["NULL"] * 4, "NULL"),
        (["NULL"] * 3 + ["INCONCLUSIVE"], "INCONCLUSIVE"),
        (["NULL"] * 3 + ["INVALID"], "INCONCLUSIVE"),
        (["INVALID"] * 4, "INVALID"),
        (["NULL", "CAUSAL", "OPPOSITE", "INVALID"], "CAUSAL"),
        (["NULL", "NON-SPECIFIC", "OPPOSITE", "INVALID"], "OPPOSITE"),
        (["NULL", "NON-SPECIFIC", "INVALID", "NULL"], "NON-SPECIFIC"),
    ],
)
def test_a_study_is_null_only_when_all_are_and_causal_when_any_is(names, expected):
    assert judge_study({str(i): Verdict(name, "so") for i, name in enumerate(names)}) == expected


def test_the_variants_are_listed_under_their_verdicts():
    found = {"inject": Verdict("NULL", ""), "subtract": Verdict("CAUSAL", ""), "upstream": Verdict("NULL", "")}
    assert listed(found) == "NULL: inject, upstream; CAUSAL: subtract"
