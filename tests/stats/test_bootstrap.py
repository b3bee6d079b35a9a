import numpy as np
import pytest
from clustered import DRAWS, clustered_values, covers
from scipy.stats import bootstrap, kstest

from sae_steer.stats import cluster_bootstrap, cluster_bootstrap_ratio, cluster_sums, wilson


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
    monkeypatch.setattr("sae_steer.stats.bootstrap.CELLS", 1000)  # two columns at a time
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


def test_the_one_sided_p_are_where_an_end_of_the_interval_meets_zero(random):
    values, ids = clustered_values(random, columns=200)
    values += 0.15
    for level in 0.5, 0.8, 0.9:
        found = cluster_bootstrap(values, ids, draws=DRAWS, level=level, seed=1)
        tail = (1 - level) / 2
        agree = (found.p_above < tail) == (found.low > 0), (found.p_below < tail) == (found.high < 0)
        assert np.mean(agree) > 0.99  # an end is one of the draws, so they differ by a draw at most
    np.testing.assert_allclose(found.p_above + found.p_below, 1)


def test_the_one_sided_p_of_no_effect_is_uniform(random):
    values, ids = clustered_values(random, clusters=100, columns=500)
    assert kstest(cluster_bootstrap(values, ids, draws=DRAWS, seed=1).p_above, "uniform").pvalue > 0.01


def test_p_of_a_constant_is_that_of_a_sure_sign():
    found = cluster_bootstrap(np.array([[1.0, -1.0, 0.0]] * 50), np.arange(50), draws=200, seed=1)
    np.testing.assert_array_equal(found.p_above, [1 / 200, 1, 1])
    np.testing.assert_array_equal(found.p_below, [1, 1 / 200, 1])
