"""Readings as numbers: what has no value is None, and never a figure that looks like one."""

import numpy as np
import pytest

from sae_steer import stats
from sae_steer.effects.estimates import FEWEST_RANKED, control_families, estimates, is_ranked, worst_rank
from sae_steer.effects.measure import OnsetRows
from sae_steer.settings import LEVEL, InterveneSettings

SETTINGS = InterveneSettings(bootstrap_draws=400)


@pytest.fixture(scope="module")
def rows():
    """One onset of each of 60 tasks; no texts, for nothing is read here."""
    task = np.arange(60)
    return OnsetRows((), prompt=task, task=task, position=task, is_target=task > 30)


@pytest.mark.parametrize("mean", [0.0, 0.001, -0.001])
def test_a_share_of_a_gap_that_may_be_zero_has_no_value(rows, mean):
    random = np.random.default_rng(1)
    gap, effect = random.normal(mean, 0.2, 60), np.full((60, 1), 0.01)
    row = estimates(effect, rows, SETTINGS.resampling, gap)[0]
    assert (row.share, row.share_low, row.share_high) == (None, None, None)
    assert row.mean == pytest.approx(0.01)


def test_a_share_of_a_gap_that_is_there_is_the_ratio_of_the_means(rows):
    random = np.random.default_rng(1)
    gap, effect = random.normal(0.3, 0.1, 60), random.normal(0.06, 0.01, (60, 1))
    row = estimates(effect, rows, SETTINGS.resampling, gap)[0]
    assert row.share == pytest.approx(effect.sum() / gap.sum())
    assert row.share_low < row.share < row.share_high


@pytest.mark.parametrize("controls", [1, 5, 18, 19, 49, 199])
def test_a_family_is_ranked_only_if_a_rank_in_it_could_be_as_small_as_the_level(controls):
    settings = InterveneSettings(controls=controls)
    means = np.random.default_rng(0).normal(0, 0.006, controls)
    family = control_families(-0.068, {("isotropic", 1.0): means}, settings)[0]
    least = stats.rank_p(1e9, means)
    assert family.ranked == is_ranked(controls, settings) == (least <= LEVEL)
    assert worst_rank([family]) == (family.rank_p if controls >= FEWEST_RANKED else None)
