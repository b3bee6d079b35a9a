"""Means and shares of clustered rows, with intervals and p that resample whole clusters."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int, Real
from scipy.special import ndtr, ndtri
from scipy.stats import t as student

CELLS = 2**22
"""Resampled values held at once: 32 MiB of float64."""


@dataclass(frozen=True)
class Estimate:
    """Means or shares, one a column, with bootstrap intervals and the counts behind them."""

    mean: Float[np.ndarray, " column"]
    low: Float[np.ndarray, " column"]
    high: Float[np.ndarray, " column"]
    se: Float[np.ndarray, " column"]
    """Linearised cluster-robust standard error: no heavy tail when a share's denominator is small."""
    p_above: Float[np.ndarray, " column"]
    """One-sided p that the truth is zero or below: under (1 - level) / 2 where `low` is above zero."""
    p_below: Float[np.ndarray, " column"]
    """One-sided p that the truth is zero or above."""
    level: float
    n: int
    """Rows."""
    clusters: int


def cluster_sums(
    values: Real[np.ndarray, "row column"], clusters: Int[np.ndarray, " row"]
) -> Float[np.ndarray, "cluster column"]:
    """Sums of the rows of each cluster, in the order of the clusters' numbers."""
    assert len(values) > 0, "no rows to sum"
    order = np.argsort(clusters, kind="stable")
    _, starts = np.unique(clusters[order], return_index=True)
    return np.add.reduceat(values[order].astype(np.float64), starts, axis=0)


def cluster_bootstrap(
    values: Real[np.ndarray, "row column"],
    clusters: Int[np.ndarray, " row"],
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int,
    weights: Real[np.ndarray, " row"] | None = None,
) -> Estimate:
    """Mean over rows with a BCa interval that resamples whole clusters.

    Each resample's mean is sum / sum over the clusters drawn, because clusters differ in size. All columns
    share the resamples. Clusters without weight are left out.

    Args:
        weights: of the rows; none is onset-weighted, 1 / (onsets of the prompt) is prompt-weighted.
    """
    weight = np.ones(len(values)) if weights is None else weights.astype(np.float64)
    assert np.all(weight >= 0), "weights must be numbers, none of them negative"
    used = weight > 0
    weight, values, clusters = weight[used, None], values[used], clusters[used]
    return cluster_bootstrap_ratio(weight * values, weight, clusters, draws=draws, level=level, seed=seed)


def cluster_bootstrap_ratio(
    numerator: Real[np.ndarray, "row column"],
    denominator: Real[np.ndarray, " row #column"],
    clusters: Int[np.ndarray, " row"],
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int,
) -> Estimate:
    """Sum of the numerators over sum of the denominators, such as an effect's share of the gap, with BCa.

    Both sums come from the same clusters, so the gap brings its own noise. Where more than
    (1 - level) / 2 of the resampled denominators have the other sign, no bounded interval exists
    (Fieller 1954): low and high are then -inf and inf.
    """
    assert np.isfinite(numerator).all(), "the values hold a NaN or an infinity"
    assert np.isfinite(denominator).all(), "the denominators hold a NaN or an infinity"
    above, below = cluster_sums(numerator, clusters), cluster_sums(denominator, clusters)
    assert len(above) > 1, "one cluster has no spread to resample; at least 2 are needed"
    assert np.all(below.sum(axis=0) != 0), "the denominators sum to zero: there is nothing to share"
    counts = resampled_counts(len(above), draws, seed)
    below = np.broadcast_to(below, above.shape)
    width = max(1, CELLS // draws)
    blocks = [
        _bca(counts, above[:, start : start + width], below[:, start : start + width], level)
        for start in range(0, above.shape[1], width)
    ]
    low, high, p_above, p_below = np.concatenate(blocks, axis=1)
    return Estimate(
        mean=above.sum(axis=0) / below.sum(axis=0),
        low=low,
        high=high,
        se=np.sqrt(squared_se(influence(above, below))),
        p_above=p_above,
        p_below=p_below,
        level=level,
        n=len(numerator),
        clusters=len(above),
    )


@lru_cache(maxsize=4)
def resampled_counts(clusters: int, draws: int, seed: int) -> Float[np.ndarray, "draw cluster"]:
    """How often each resample holds each cluster; kept, because a study asks for the same ones hundreds of times."""
    picks = np.random.default_rng(seed).integers(clusters, size=(draws, clusters))
    cells = picks + clusters * np.arange(draws)[:, None]
    counts = np.bincount(cells.ravel(), minlength=draws * clusters)
    found = counts.reshape(draws, clusters).astype(np.float64)
    found.flags.writeable = False  # shared by all that ask
    return found


def influence(
    above: Real[np.ndarray, "cluster column"], below: Real[np.ndarray, " cluster #column"]
) -> Float[np.ndarray, "cluster column"]:
    """What each cluster pulls a ratio of sums by, to first order (Taylor linearisation)."""
    total = below.sum(axis=0)
    return (above - above.sum(axis=0) / total * below) / total


def squared_se(pulls: Float[np.ndarray, "cluster column"]) -> Float[np.ndarray, " column"]:
    """The squared standard error of a ratio of sums, from its clusters' `influence`."""
    clusters = len(pulls)
    assert clusters > 1, "one cluster has no spread; at least 2 are needed"
    return clusters / (clusters - 1) * (pulls**2).sum(axis=0)


def _bca(
    counts: Float[np.ndarray, "draw cluster"],
    above: Float[np.ndarray, "cluster column"],
    below: Float[np.ndarray, "cluster column"],
    level: float,
) -> Float[np.ndarray, "4 column"]:
    """Bias-corrected and accelerated ends (Efron 1987), acceleration by the infinitesimal jackknife (§7),
    and the two one-sided p: the tails at which an end of the interval meets zero.

    The normal quantiles are widened to t with clusters - 1 degrees of freedom (Hesterberg 2015, The
    American Statistician 69, "expanded percentile"): a resample varies less than a sample does.
    """
    mean = above.sum(axis=0) / below.sum(axis=0)
    drawn_above, drawn_below = counts @ above, counts @ below
    drawn = np.divide(drawn_above, drawn_below, out=np.copysign(np.inf, drawn_above), where=drawn_below != 0)
    drawn.sort(axis=0)

    draws, clusters = counts.shape
    bias = _normal_score(_share_below(drawn, mean), draws)
    pull = influence(above, below)
    square = (pull**2).sum(axis=0)
    cube = (pull**3).sum(axis=0)
    acceleration = np.divide(cube, 6 * square**1.5, out=np.zeros(mean.shape), where=square**1.5 > 0)
    widen = np.sqrt(clusters / (clusters - 1))

    ends = []
    for tail, to_index in ((1 - level) / 2, np.floor), ((1 + level) / 2, np.ceil):
        shifted = bias + widen * student.ppf(tail, clusters - 1)
        corrected = ndtr(bias + shifted / np.maximum(1 - acceleration * shifted, 1e-9))
        index = to_index(corrected * (draws + 1) - 1).clip(0, draws - 1).astype(int)
        ends.append(np.take_along_axis(drawn, index[None], axis=0)[0])
    reached = _normal_score(_share_below(drawn, 0.0), draws) - bias  # the same two lines, solved for the tail
    shifted = reached / np.maximum(1 + acceleration * reached, 1e-9)
    p_above = student.cdf((shifted - bias) / widen, clusters - 1)

    flipped = (drawn_below * below.sum(axis=0) <= 0).mean(axis=0) > (1 - level) / 2
    low, high, p_above, p_below = np.where(
        flipped, [[-np.inf], [np.inf], [1], [1]], np.stack([*ends, p_above, 1 - p_above])
    )
    constant = np.sqrt(square) <= 1e-12 * np.abs(mean)  # rounding, not spread
    sure = np.stack([mean, mean, np.where(mean > 0, 1 / draws, 1), np.where(mean < 0, 1 / draws, 1)])
    return np.where(constant, sure, np.stack([low, high, p_above, p_below]))


def _share_below(drawn: Float[np.ndarray, "draw column"], value: float | Float[np.ndarray, " column"]) -> np.ndarray:
    """Share of the resamples below a value, a tie being half."""
    return ((drawn < value).sum(axis=0) + (drawn <= value).sum(axis=0)) / (2 * len(drawn))


def _normal_score(share: Float[np.ndarray, " column"], draws: int) -> Float[np.ndarray, " column"]:
    return ndtri(share.clip(0.5 / draws, 1 - 0.5 / draws))
