import pytest

from sae_steer.report import numbers


@pytest.mark.parametrize(
    ("estimate", "written"),
    [
        ({"mean": 0.0123, "low": 0.0045, "high": 0.0201}, "+1.23 [+0.45, +2.01]"),
        ({"mean": -0.2431, "low": -0.26, "high": -0.22}, "−24.3 [−26.0, −22.0]"),
        ({"mean": 0.0, "low": 0.0, "high": 0.0}, "0 [0, 0]"),
        ({"mean": 2e-5, "low": -1e-6, "high": 4e-5}, "+0.00200 [−0.00010, +0.00400]"),
    ],
)
def test_an_interval_and_its_estimate_have_the_same_decimals(estimate, written):
    assert numbers.points_interval(estimate) == written


def test_a_share_without_bound_says_so():
    assert numbers.share_interval({"share": 0.5, "share_low": None, "share_high": 0.9}) == "+50.0 % [−∞, +90.0]"
    assert numbers.share_interval({"share": None, "share_low": None, "share_high": None}) == "n/a"


def test_a_p_value_is_never_shown_as_zero():
    assert [numbers.p_value(p) for p in (0.0421, 0.0004, 0)] == ["0.042", "4e−04", "< 1e-300"]


def test_a_chosen_share_gains_no_digits():
    assert [numbers.setting(share) for share in (0.01, 0.001, 1e-7, 1)] == ["1 %", "0.1 %", "0.00001 %", "100 %"]
