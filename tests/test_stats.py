import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, false_discovery_control, kstest, percentileofscore, spearmanr

from sae_steer.stats import (
    aa_null,
    benjamini_hochberg,
    cluster_bootstrap,
    cluster_bootstrap_ratio,
    cluster_sums,
    design_effect,
    paired_log_odds,
    paired_rate_p,
    percentile_among,
    rank_p,
    spearman,
    wilson,
)

DRAWS = 2000


@pytest.fixture
def random():
    return np.random.default_rng(0)


def sizes_of_clusters(random, clusters):
    """Rows a cluster, as uneven as the onsets of plans."""
    return random.integers(1, 12, size=clusters)


def clustered_values(random, *, clusters=60, columns=800, between=1.0):
    """Rows of mean zero, each cluster shifted, larger clusters no different from smaller ones."""
    ids = np.repeat(np.arange(clusters), sizes_of_clusters(random, clusters))
    shift = between * random.standard_t(6, size=(clusters, columns))
    return shift[ids] + random.normal(size=(len(ids), columns)), ids


def null_counts(random, *, rate, clusters=120, columns=3000, spread=1.0, repeats=1):
    """Hits of two models that fire equally often; tasks differ in rate, and the two models do within them."""
    trials = repeats * sizes_of_clusters(random, clusters)[:, None]
    task = random.gamma(1 / spread, spread, size=(clusters, columns))
    hits = []
    for _ in range(2):
        within = random.gamma(1 / spread, spread, size=(clusters, columns))
        hits.append(random.binomial(trials, np.minimum(rate * task * within, 1)))
    return *hits, trials


def covers(found, truth):
    return np.mean((found.low <= truth) & (truth <= found.high))


# Rates


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


# Means and shares of clustered rows


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_cluster_bootstrap_covers_as_often_as_it_says(random, level):
    values, ids = clustered_values(random)
    found = cluster_bootstrap(values, ids, draws=DRAWS, level=level, seed=1)
    assert covers(found, 0) == pytest.approx(level, abs=0.03)
    rows = cluster_bootstrap(values, np.arange(len(ids)), draws=DRAWS, level=level, seed=1)
    assert covers(rows, 0) < level - 0.15


def test_the_share_of_a_noisy_gap_is_covered_as_often_as_it_says(random):
    noise, ids = clustered_values(random)
    gap_noise = random.normal(size=(ids.max() + 1, noise.shape[1]))[ids]
    gap = 2 + gap_noise
    found = cluster_bootstrap_ratio(0.3 * gap + noise, gap, ids, draws=DRAWS, seed=1)
    assert covers(found, 0.3) == pytest.approx(0.95, abs=0.03)


def test_clusters_widen_the_interval_and_independent_rows_do_not(random):
    for between, least, most in (1.0, 1.5, 4.0), (0.0, 0.9, 1.1):
        values, ids = clustered_values(random, columns=100, between=between)
        clustered = cluster_bootstrap(values, ids, draws=DRAWS, seed=1)
        rows = cluster_bootstrap(values, np.arange(len(ids)), draws=DRAWS, seed=1)
        ratio = np.mean((clustered.high - clustered.low) / (rows.high - rows.low))
        assert least < ratio < most


def test_one_row_a_cluster_is_the_bca_bootstrap_of_scipy(random):
    values = random.exponential(size=(80, 1))
    found = cluster_bootstrap(values, np.arange(80), draws=40_000, seed=1)
    theirs = bootstrap((values[:, 0],), np.mean, n_resamples=40_000, method="BCa", rng=2)
    assert found.mean[0] == pytest.approx(values.mean())
    assert found.low[0] == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert found.high[0] == pytest.approx(theirs.confidence_interval.high, abs=0.01)
    assert found.se[0] == pytest.approx(values.std(ddof=1) / np.sqrt(80))
    assert (found.n, found.clusters, found.level) == (80, 80, 0.95)


def test_a_constant_column_has_an_interval_of_no_width(random):
    values = np.column_stack([np.full(50, 0.1), np.zeros(50), random.normal(size=50)])
    found = cluster_bootstrap(values, np.arange(50) // 3, draws=200, seed=1)
    np.testing.assert_array_equal(found.low[:2], found.mean[:2])
    np.testing.assert_array_equal(found.high[:2], found.mean[:2])
    np.testing.assert_allclose(found.mean[:2], [0.1, 0])
    assert found.low[2] < found.mean[2] < found.high[2]


def test_one_hit_in_one_cluster_still_has_a_finite_interval():
    values = np.zeros((90, 1))
    values[4] = 1
    found = cluster_bootstrap(values, np.arange(90) // 3, draws=DRAWS, seed=1)
    assert found.low[0] <= found.mean[0] <= found.high[0] < 1


def test_weights_are_repeated_rows(random):
    values, ids = clustered_values(random, clusters=12, columns=3)
    times = random.integers(0, 4, size=len(ids))
    times[ids == 5] = 0  # a cluster without weight is no cluster
    weighted = cluster_bootstrap(values, ids, draws=500, seed=1, weights=times)
    repeated = cluster_bootstrap(np.repeat(values, times, axis=0), np.repeat(ids, times), draws=500, seed=1)
    np.testing.assert_allclose(weighted.mean, repeated.mean)
    np.testing.assert_allclose(weighted.low, repeated.low)
    np.testing.assert_allclose(weighted.se, repeated.se)
    assert weighted.clusters == 11


def test_intervals_depend_on_the_seed_alone_not_on_order_labels_or_neighbours(random, monkeypatch):
    values, ids = clustered_values(random, clusters=20, columns=5)
    found = cluster_bootstrap(values, ids, draws=500, seed=1)
    monkeypatch.setattr("sae_steer.stats.CELLS", 1000)  # two columns at a time
    shuffled = random.permutation(len(ids))
    again = cluster_bootstrap(values[shuffled], 7 * ids[shuffled] - 30, draws=500, seed=1)
    np.testing.assert_allclose(again.low, found.low)
    np.testing.assert_allclose(again.high, found.high)
    assert not np.allclose(cluster_bootstrap(values, ids, draws=500, seed=2).low, found.low)


def test_a_share_of_a_gap_that_may_be_zero_is_unbounded(random):
    effect, ids = clustered_values(random, columns=2)
    gap = np.column_stack([random.normal(size=len(ids)) * 5 + 0.01, np.ones(len(ids))])
    found = cluster_bootstrap_ratio(effect, gap, ids, draws=500, seed=1)
    assert (found.low[0], found.high[0]) == (-np.inf, np.inf)
    assert np.isfinite([found.low[1], found.high[1]]).all()


def test_numbers_that_are_not_numbers_are_refused():
    values = np.ones((6, 1))
    values[2] = np.nan
    with pytest.raises(AssertionError, match="NaN"):
        cluster_bootstrap(values, np.arange(6) // 2, seed=1)
    with pytest.raises(AssertionError, match="numbers"):
        wilson(np.array([np.nan]), np.array([3.0]))
    with pytest.raises(AssertionError, match="one cluster"):
        cluster_bootstrap(np.ones((6, 1)), np.zeros(6, dtype=int), seed=1)


def test_cluster_sums_are_the_sums_of_each_cluster():
    sums = cluster_sums(np.array([[1, 10], [2, 20], [4, 40]]), np.array([9, 3, 9]))
    np.testing.assert_array_equal(sums, [[2, 20], [5, 50]])


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


# Ranks


def test_spearman_is_scipys_and_sees_order_alone(random):
    x, y = random.normal(size=(2, 50))
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    with pytest.raises(AssertionError, match="constant"):
        spearman(x, np.ones(50))


def test_percentiles_rank_every_value_among_the_alive_ones(random):
    values = random.integers(0, 30, size=100)
    alive = random.uniform(size=100) < 0.6
    expected = percentileofscore(values[alive], values, kind="mean")
    np.testing.assert_allclose(percentile_among(values, alive), expected)
    assert percentile_among(np.array([0.0, 5.0]), np.array([False, True])).tolist() == [0, 50]
