import numpy as np
import pytest
from scipy.stats import false_discovery_control, kstest

from sae_steer.stats import aa_null, benjamini_hochberg, holm, rank_p, sign_flip_p


def test_benjamini_hochberg_is_scipys_and_orders_as_p_does(random):
    p = random.uniform(size=200) ** 3
    q = benjamini_hochberg(p)
    np.testing.assert_array_equal(q, false_discovery_control(p, method="bh"))
    assert np.all(q >= p)
    assert np.all(np.diff(q[np.argsort(p)]) >= 0)


# Sampled arms


def test_the_null_of_a_model_against_itself_is_centred(random):
    trials = random.integers(1, 6, size=(80, 16))
    successes = random.binomial(trials, random.beta(1, 2, size=(80, 1)))
    null = aa_null(successes, trials, draws=4000, seed=1)
    assert null.shape == (4000,)
    assert abs(null.mean()) < 4 * null.std() / np.sqrt(4000)
    np.testing.assert_array_equal(null, aa_null(successes, trials, draws=4000, seed=1))


def test_the_null_never_pairs_a_generation_with_itself():
    null = aa_null(np.array([[0, 1]]), np.array([[1, 1]]), draws=200, seed=1)
    assert set(null) == {-1.0, 1.0}


def test_two_fresh_arms_of_one_model_get_uniform_p(random):
    rates, found = random.beta(1, 2, size=(80, 1)), []
    for study in range(200):
        successes = random.binomial(4, rates, size=(80, 18))
        trials = np.full((80, 16), 4)
        observed = (successes[:, 16].sum() - successes[:, 17].sum()) / 320
        found.append(rank_p(observed, aa_null(successes[:, :16], trials, draws=200, seed=study)))
    assert kstest(found, "uniform").pvalue > 0.01


def test_rank_p_counts_the_null_values_as_far_out_on_either_side():
    null = np.array([-3.0, -1.0, 0.0, 1.0, 2.0])
    assert rank_p(2.0, null) == 3 / 6
    assert rank_p(-2.0, null) == 3 / 6
    assert rank_p(9.0, null) == 1 / 6
    assert rank_p(0.0, null) == 1


def test_a_rank_of_many_is_the_rank_of_each(random):
    observed, null = random.normal(size=40), random.normal(size=99)
    np.testing.assert_array_equal(rank_p(observed, null), [rank_p(float(one), null) for one in observed])


# Sign flips


@pytest.mark.parametrize("sizes", ["equal", "one large"])
def test_sign_flips_of_no_effect_give_uniform_p_at_unequal_cluster_sizes(random, sizes):
    size = np.full(40, 4) if sizes == "equal" else np.array([60, *[2] * 39])
    ids = np.repeat(np.arange(40), size)
    values = random.standard_t(3, size=(40, 600))[ids] + random.normal(size=(len(ids), 600))
    p = sign_flip_p(values, ids, draws=999, seed=1)
    assert kstest(p, "uniform").pvalue > 0.01
    flipped_by_row = sign_flip_p(values, np.arange(len(ids)), draws=999, seed=1)
    assert np.mean(flipped_by_row < 0.05) > 0.15


def test_sign_flips_see_an_effect_on_either_side_and_never_give_zero(random):
    values, ids = random.normal(size=(200, 1)), np.repeat(np.arange(50), 4)
    for effect in (2.0, -2.0):
        assert sign_flip_p(values + effect, ids, draws=999, seed=1)[0] == 1 / 1000
    assert sign_flip_p(np.zeros((200, 1)), ids, draws=99, seed=1)[0] == 1


def test_sign_flips_of_three_clusters_reach_no_less_than_a_quarter():
    p = sign_flip_p(np.ones((3, 1)), np.arange(3), draws=20_000, seed=1)[0]
    assert p == pytest.approx(0.25, abs=0.01)


# Many p at once


def test_holm_is_the_worked_example():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_array_equal(holm(np.array([0.4, 0.9])), [0.8, 0.9])


def test_holm_errs_in_five_per_cent_of_families_and_rejects_what_bonferroni_does(random):
    p = random.uniform(size=(4000, 4))
    adjusted = np.array([holm(family) for family in p])
    assert np.mean((adjusted < 0.05).any(axis=1)) == pytest.approx(0.05, abs=0.011)
    assert np.all(adjusted <= np.minimum(4 * p, 1))
