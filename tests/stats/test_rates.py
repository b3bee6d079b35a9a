import numpy as np
import pytest
from clustered import covers, null_counts
from scipy.stats import binomtest, kstest

from sae_steer.stats import benjamini_hochberg, design_effect, paired_log_odds, paired_rate_p, wilson


def test_wilson_is_the_interval_of_scipy():
    hits, tried = np.array([0, 1, 7, 50, 100]), np.array([10, 3, 20, 100, 100])
    low, high = wilson(hits, tried, level=0.9)
    for k, n, a, b in zip(hits, tried, low, high, strict=True):
        expected = binomtest(int(k), int(n)).proportion_ci(0.9, method="wilson")
        assert (a, b) == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_of_nothing_tried_is_the_whole_unit():
    low, high = wilson(np.array([0]), np.array([0]))
    assert (low[0], high[0]) == pytest.approx((0, 1))


def test_a_design_effect_divides_the_trials_and_below_one_counts_as_one():
    hits, tried = np.array([40.0]), np.array([100.0])
    np.testing.assert_allclose(wilson(hits, tried, deff=4.0), wilson(hits / 4, tried / 4))
    np.testing.assert_allclose(wilson(hits, tried, deff=0.3), wilson(hits, tried))


def test_design_effect_is_one_when_independent_and_the_cluster_size_when_identical(random):
    trials = np.full((400, 1), 5)
    independent = random.binomial(5, 0.3, size=(400, 500))
    assert design_effect(independent, trials).mean() == pytest.approx(1, abs=0.02)
    identical = 5 * random.binomial(1, 0.3, size=(400, 500))
    assert design_effect(identical, trials).mean() == pytest.approx(5, rel=0.02)
    assert design_effect(np.zeros((400, 1)), trials)[0] == 1


def test_wilson_covers_a_clustered_rate_only_with_its_design_effect(random):
    hits, _, trials = null_counts(random, rate=0.2, columns=2000)
    total, tried = hits.sum(axis=0), np.broadcast_to(trials.sum(), 2000)
    truth = hits.sum() / (2000 * trials.sum())  # capped at 1, so not .2 exactly
    coverage = []
    for deff in 1.0, design_effect(hits, trials):
        low, high = wilson(total, tried, deff=deff)
        coverage.append(np.mean((low <= truth) & (truth <= high)))
    assert coverage[0] < 0.88
    assert coverage[1] == pytest.approx(0.95, abs=0.025)


# Two models' firing at the same onsets


@pytest.mark.parametrize("rate", [0.0005, 0.002, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_p_of_equal_rates_is_never_too_small(random, rate, spread):
    a, b, trials = null_counts(random, rate=rate, spread=spread)
    p = paired_rate_p(a, b, trials)
    assert np.all((p > 0) & (p <= 1))
    assert kstest(p, "uniform", alternative="greater").pvalue > 0.01  # "greater": too many small p
    for level in 0.05, 0.01, 0.001:
        assert np.mean(p <= level) <= level + 2.6 * np.sqrt(level / len(p))


def test_the_p_of_equal_rates_is_uniform_when_counts_are_many(random):
    a, b, trials = null_counts(random, rate=0.3, clusters=300, spread=0.1, repeats=40)
    assert kstest(paired_rate_p(a, b, trials), "uniform").pvalue > 0.01


def test_the_wald_p_of_frequent_features_is_never_too_small(random):
    a, b, trials = null_counts(random, rate=0.1)
    found = paired_log_odds(a, b, trials)
    assert np.mean(found.p <= 0.05) <= 0.06
    assert covers(found, 0) >= 0.94


def test_a_feature_of_one_model_alone_survives_the_correction(random):
    a, b, trials = null_counts(random, rate=0.01, columns=4096)
    a[:, 7], b[:, 7] = random.binomial(trials[:, 0], 0.6), 0
    q = benjamini_hochberg(paired_rate_p(a, b, trials))
    assert q[7] < 1e-6
    assert np.sum(q < 0.05) <= 2


def test_hits_of_one_cluster_are_one_observation():
    a, b, trials = np.zeros((100, 1)), np.zeros((100, 1)), np.full((100, 1), 25)
    a[3] = 20
    assert paired_rate_p(a, b, trials)[0] == pytest.approx(1)
    assert paired_log_odds(a, b, trials).p[0] == pytest.approx(0.01, abs=0.003)


def test_features_that_never_fire_do_not_differ():
    none = np.zeros((50, 2))
    assert np.all(paired_rate_p(none, none, np.full((50, 1), 4)) == 1)
    found = paired_log_odds(none, none, np.full((50, 1), 4))
    np.testing.assert_array_equal(found.log_odds, [0, 0])
    np.testing.assert_array_equal(found.p, [1, 1])


def test_exchanging_the_models_flips_the_sign_alone(random):
    a, b, trials = null_counts(random, rate=0.05, columns=20)
    one, other = paired_log_odds(a, b, trials), paired_log_odds(b, a, trials)
    np.testing.assert_allclose(one.log_odds, -other.log_odds)
    np.testing.assert_allclose(one.low, -other.high)
    np.testing.assert_allclose(one.se, other.se)
    np.testing.assert_allclose(paired_rate_p(a, b, trials), paired_rate_p(b, a, trials))


def test_log_odds_are_haldanes_and_their_error_never_below_the_binomial():
    a, b, trials = np.full((40, 1), 3), np.full((40, 1), 1), np.full((40, 1), 5)
    found = paired_log_odds(a, b, trials)
    assert found.log_odds[0] == pytest.approx(np.log(120.5 / 80.5) - np.log(40.5 / 160.5))
    assert found.se[0] == pytest.approx(np.sqrt(1 / 120.5 + 1 / 80.5 + 1 / 40.5 + 1 / 160.5))


def test_clusters_widen_the_log_odds(random):
    trials = np.full((60, 1), 10)
    a, b = 10 * random.binomial(1, 0.5, size=(60, 1)), 10 * random.binomial(1, 0.5, size=(60, 1))
    independent = np.sqrt(4 * 2 / 600)
    assert paired_log_odds(a, b, trials).se[0] == pytest.approx(np.sqrt(10) * independent, rel=0.25)


def test_what_the_models_share_within_clusters_cancels(random):
    trials = np.full((60, 1), 10)
    a = 10 * random.binomial(1, 0.5, size=(60, 1))
    alone = paired_log_odds(a, np.full((60, 1), 5), trials).se[0]
    assert paired_log_odds(a, a, trials).se[0] < alone / 2
