"""Rules over counted verdicts: what is right, what is left out, and which intervals stand beside the rates."""

import pytest

from sae_steer.selftest.kinds import VARIANTS, is_right, promised, right_of
from sae_steer.selftest.summary import rate, summary

BOUND = 0.012


def study(kind: str, number: int, verdicts: dict[str, str], sizes: dict[str, float]) -> dict:
    """A study's record, effects given in bounds and with the sign that is predicted."""
    variants = {}
    for variant, verdict in verdicts.items():
        sign = 1 if VARIANTS[variant] == "reference" else -1
        truth = {"base": 0.1, "single": sign * BOUND * sizes[variant], "joint": sign * BOUND * sizes[variant]}
        tested = variant in right_of(kind)
        variants[variant] = {
            "truth": truth,
            "verdict": verdict,
            "promised": promised(kind, variant, truth, BOUND) if tested else None,
            "right": is_right(kind, variant, verdict) if tested else None,
            "failed_gates": [],
        }
    return {"kind": kind, "number": number, "bound": BOUND, "verdict": "CAUSAL", "gates": [], "variants": variants}


def level(number: int, special: int) -> dict:
    return {"number": number, "variants": {"inject": {"isotropic": {"special": special, "fresh": 100}}}}


@pytest.mark.parametrize(
    ("kind", "variant", "single", "joint", "held"),
    [
        ("causal", "inject", 3.0, 0.0, True),
        ("causal", "inject", -3.0, 0.0, False),
        ("causal", "subtract", -3.0, -1.0, True),
        ("inert", "subtract", 0.5, -0.6, True),
        ("inert", "subtract", 0.1, -0.8, False),
        ("boundary", "inject", 0.9, 1.02, True),
        ("boundary", "inject", 1.2, 1.0, False),
    ],
)
def test_a_verdict_counts_only_where_the_measured_truth_is_what_the_kind_promises(kind, variant, single, joint, held):
    assert promised(kind, variant, {"single": single * BOUND, "joint": joint * BOUND}, BOUND) is held


def test_at_the_bound_both_claims_are_wrong():
    assert [is_right("boundary", "inject", verdict) for verdict in ("CAUSAL", "NULL", "INCONCLUSIVE")] == [
        False,
        False,
        True,
    ]


def test_wrong_verdicts_are_counted_by_kind_and_those_not_as_promised_left_out():
    found = summary(
        [
            study("inert", 0, {"inject": "NULL", "subtract": "CAUSAL"}, {"inject": 0.1, "subtract": 0.2}),
            study("inert", 1, {"inject": "NULL", "subtract": "CAUSAL"}, {"inject": 0.1, "subtract": 5.0}),
        ],
        [],
    )
    right = found["right_by_kind"]["inert"]
    assert (right["hits"], right["verdicts"]) == (2, 3)
    assert (right["studies"]["hits"], right["studies"]["n"]) == (1, 2)  # one wrong verdict makes a study wrong
    assert found["inert_called_causal"]["studies"]["hits"] == 1
    assert found["not_as_promised"] == {"inert, subtract": 1}


def test_the_level_has_an_interval_that_resamples_studies():
    found = summary([], [level(number, special) for number, special in enumerate((2, 9, 5, 4))])["level"]["isotropic"]
    assert found["rate"] == pytest.approx(0.05)
    assert found["low"] < 0.05 < found["high"]
    equal = summary([], [level(number, 5) for number in range(4)])["level"]["isotropic"]
    assert equal["high"] - equal["low"] < found["high"] - found["low"]


def test_an_exact_interval_of_no_hits_ends_above_zero():
    assert rate([False] * 60)["high"] == pytest.approx(1 - 0.025 ** (1 / 60))
    assert rate([]) is None
