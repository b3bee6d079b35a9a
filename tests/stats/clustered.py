"""Rows and counts that come in clusters, for the tests of statistics."""

import numpy as np

DRAWS = 2000


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
