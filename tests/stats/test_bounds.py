"""Levels and powers of the tests against a bound, by simulation."""

import numpy as np
import pytest
from clustered import DRAWS

from sae_steer.errors import InputError
from sae_steer.stats import against_bound, check_clusters, minimum_detectable, sample_size

COLUMNS, CLUSTERS, ROWS = 600, 110, 3
GAP = 0.10
BOUND = 0.05 * GAP


def studies(random, *, effect, gap=GAP, sd=0.012, gap_sd=0.2, tie=0.0):
    """Effects and gaps of many studies: rows of 110 tasks, shifted by task; effects share `tie` of the gap's noise."""
    ids = np.repeat(np.arange(CLUSTERS), ROWS)
    shape = (len(ids), COLUMNS)
    noise, shift = random.normal(size=shape), random.normal(size=(CLUSTERS, COLUMNS))[ids]
    wobble = gap_sd * (random.normal(size=shape) + random.normal(size=(CLUSTERS, COLUMNS))[ids])
    return effect + sd * (noise + shift) / 2 + tie * wobble, gap + wobble, ids


def compared(*studies, **settings):
    return against_bound(*studies, draws=DRAWS, seed=1, **settings)


@pytest.mark.parametrize("tie", [0.0, 0.05])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_effect_at_the_bound_is_called_beyond_or_inside_in_five_per_cent(random, sign, tie):
    found = compared(*studies(random, effect=sign * BOUND, tie=sign * tie), cap=1.0)
    assert np.mean(found.beyond(sign)) <= 0.05 + 2.6 * np.sqrt(0.05 / COLUMNS)
    assert np.mean(found.inside()) <= 0.05 + 2.6 * np.sqrt(0.05 / COLUMNS)
    assert not found.beyond(-sign).any()


def test_a_bound_from_another_split_put_in_as_a_number_has_no_such_level(random):
    """What the contrast is for: the gap of the tune split, a fifth as large, is not the gap here."""
    effect, gap, ids = studies(random, effect=BOUND, sd=0.002, gap_sd=0.2)
    tune = 0.05 * (GAP + 0.2 * random.normal(size=COLUMNS) / np.sqrt(CLUSTERS / 5))
    plugged = against_bound(effect - tune, np.zeros((len(ids), 1)), ids, cap=0.0, share=0.0, draws=DRAWS, seed=1)
    assert np.mean(plugged.effect.p_above < 0.05) > 0.2
    assert np.mean(compared(effect, gap, ids, cap=1.0).beyond(1)) < 0.08


def test_the_cap_is_the_bound_where_five_per_cent_of_the_gap_is_more(random):
    effect, gap, ids = studies(random, effect=0.012, gap=0.6, gap_sd=0.1)
    found = compared(effect, gap, ids)
    assert np.mean(found.beyond(1)) <= 0.075
    assert np.mean(found.inside()) <= 0.075
    np.testing.assert_array_equal(found.bound, 0.012)
    assert compared(effect + 0.01, gap, ids).beyond(1).all()


def test_where_share_and_cap_are_equal_neither_level_is_exceeded(random):
    found = compared(*studies(random, effect=0.012, gap=0.24))
    assert np.mean(found.beyond(1)) <= 0.05 + 2.6 * np.sqrt(0.05 / COLUMNS)
    assert np.mean(found.inside()) <= 0.05 + 2.6 * np.sqrt(0.05 / COLUMNS)


def test_an_effect_of_none_is_inside_and_a_large_one_beyond(random):
    effect, gap, ids = studies(random, effect=0.0, gap_sd=0.05)
    found = compared(effect, gap, ids)
    assert found.inside().mean() > 0.95
    assert not found.beyond(1).any()
    assert compared(effect + 0.02, gap, ids).beyond(1).all()
    assert compared(effect - 0.02, gap, ids).beyond(-1).all()


def test_inside_is_the_ninety_per_cent_interval_of_both_contrasts_inside(random):
    found = compared(*studies(random, effect=0.3 * BOUND, sd=0.03))
    ends = np.stack([-found.less_share.high, -found.less_cap.high, found.plus_share.low, found.plus_cap.low])
    assert np.mean(found.inside() == (ends > 0).all(axis=0)) > 0.99
    assert 0.1 < found.inside().mean() < 0.9


def test_exchanging_the_models_mirrors_the_contrast(random):
    effect, gap, ids = studies(random, effect=0.004)
    found, mirrored = compared(effect, gap, ids), compared(effect, -gap, ids)
    np.testing.assert_allclose(found.bound, mirrored.bound)
    np.testing.assert_allclose(found.p_above, mirrored.p_above)


def test_a_null_needs_a_hundred_clusters_and_an_interval_thirty(random):
    tiny, gap = 1e-6 * random.normal(size=(99, 1)), np.full((99, 1), 0.2)
    assert not compared(tiny, gap, np.arange(99)).inside()[0]
    assert compared(np.append(tiny, [[0]], 0), np.full((100, 1), 0.2), np.arange(100)).inside()[0]
    with pytest.raises(InputError, match="come from 29 tasks; intervals over tasks need 30"):
        compared(tiny[:29], gap[:29], np.arange(29))
    assert check_clusters(np.arange(60) // 2) == 30


def test_the_advised_onsets_place_a_quarter_of_the_bound_inside_in_nine_of_ten_studies(random):
    """SD_80 asks for more than needed on average: the power is at least what was asked."""
    found, share = [], 0.25
    pilot, _, ids = studies(random, effect=0.0, sd=0.04, gap_sd=0.0)
    advice = sample_size(pilot[:150, 0], ids[:150], BOUND)
    for _ in range(2):
        clusters = np.repeat(np.arange(advice.clusters), ROWS)
        shape = (len(clusters), 150)
        rows = 0.04 * (random.normal(size=shape) + random.normal(size=(advice.clusters, 150))[clusters]) / 2
        found.append(compared(rows + share * BOUND, np.full((len(clusters), 1), GAP), clusters).inside())
    assert np.mean(found) > 0.87
    assert advice.deff == pytest.approx(2, rel=0.25)
    assert advice.onsets == pytest.approx(15.2 * advice.sd_80**2 * advice.deff / BOUND**2, rel=0.005)


def test_the_minimum_detectable_effect_is_found_in_four_of_five_studies(random):
    effect, gap, ids = studies(random, effect=0.0, gap_sd=0.0)
    first = compared(effect, gap, ids)
    least = minimum_detectable(float(first.less_share.se.mean()), CLUSTERS, bound=BOUND)
    assert compared(effect + least, gap, ids).beyond(1).mean() == pytest.approx(0.8, abs=0.05)
