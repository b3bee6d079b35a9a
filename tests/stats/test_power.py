import numpy as np
import pytest
from clustered import clustered_values

from sae_steer.stats import cluster_bootstrap, design_effect_of_mean, icc


def test_the_icc_is_the_share_of_the_variance_between_clusters(random):
    ids = np.repeat(np.arange(800), random.integers(2, 9, size=800))
    values = np.sqrt(0.3) * random.normal(size=800)[ids] + np.sqrt(0.7) * random.normal(size=len(ids))
    assert icc(values, ids) == pytest.approx(0.3, abs=0.03)
    assert icc(random.normal(size=len(ids)), ids) < 0.03
    assert icc(ids.astype(float), ids) == 1


def test_the_design_effect_is_how_much_clusters_widen_a_squared_standard_error(random):
    values, ids = clustered_values(random, clusters=900, columns=1)
    clustered = cluster_bootstrap(values, ids, draws=200, seed=1).se[0]
    independent = values.std() / np.sqrt(len(values))
    assert design_effect_of_mean(values[:, 0], ids) == pytest.approx((clustered / independent) ** 2, rel=0.15)


def test_one_row_a_cluster_has_no_design_effect(random):
    values = random.normal(size=50)
    assert icc(values, np.arange(50)) == 0
    assert design_effect_of_mean(values, np.arange(50)) == 1
