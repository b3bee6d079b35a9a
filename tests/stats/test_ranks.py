import numpy as np
import pytest
from scipy.stats import percentileofscore, spearmanr

from sae_steer.stats import percentile_among, spearman


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
