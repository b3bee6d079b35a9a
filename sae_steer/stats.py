"""Arrays in, numbers out: what may be claimed from rows that come in clusters.

Rows of one task are not independent, so the cluster is the task in every interval and test. In order:
rates (Wilson, design effect), means and shares (cluster bootstrap), two models' firing read at the same
onsets (paired tests, Benjamini-Hochberg), sampled arms (A/A null, rank p), and ranks.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Real
from scipy.special import ndtr, ndtri
from scipy.stats import false_discovery_control, spearmanr
from scipy.stats import t as student

CELLS = 2**22
"""Resampled values held at once: 32 MiB of float64."""


# Rates


def wilson(
    successes: Real[np.ndarray, "*shape"],
    n: Real[np.ndarray, "*#shape"],
    *,
    deff: float | Float[np.ndarray, "*#shape"] = 1.0,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """Wilson's score interval (1927) of a rate; all of [0, 1] where nothing was tried.

    Args:
        deff: design effect; the interval is that of n / deff trials at the same rate (Korn and Graubard
            1998). Below 1 it counts as 1: an estimate under 1 is mostly the noise of few clusters.
    """
    shrink = np.maximum(deff, 1.0)
    hits, tried = np.broadcast_arrays(successes / shrink, n / shrink)
    assert np.all((hits >= 0) & (hits <= tried)), "successes must lie between 0 and n, and be numbers"
    z = ndtri((1 + level) / 2)
    spread = np.divide(hits * (tried - hits), tried, out=np.zeros(hits.shape), where=tried > 0)
    centre = (hits + z**2 / 2) / (tried + z**2)
    half = z / (tried + z**2) * np.sqrt(spread + z**2 / 4)
    return np.asarray(np.maximum(centre - half, 0)), np.asarray(np.minimum(centre + half, 1))


def design_effect(
    successes: Real[np.ndarray, "cluster column"], trials: Real[np.ndarray, " cluster #column"]
) -> Float[np.ndarray, " column"]:
    """Variance of a pooled rate, clusters counted, over its variance if all trials were independent.

    Linearised (Kish 1965; Rao and Scott 1992, "A simple method for the analysis of clustered binary
    data"). 1 where the rate is 0 or 1, which says nothing about clustering.
    """
    total = trials.sum(axis=0)
    assert np.all(total > 0), "a rate needs at least one trial"
    rate = successes.sum(axis=0) / total
    independent = rate * (1 - rate) / total
    clustered = _squared_se(_influence(successes, trials))
    return np.divide(clustered, independent, out=np.ones(rate.shape), where=independent > 0)


# Means and shares of clustered rows


@dataclass(frozen=True)
class Estimate:
    """Means or shares, one a column, with bootstrap intervals and the counts behind them."""

    mean: Float[np.ndarray, " column"]
    low: Float[np.ndarray, " column"]
    high: Float[np.ndarray, " column"]
    se: Float[np.ndarray, " column"]
    """Linearised cluster-robust standard error: no heavy tail when a share's denominator is small."""
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
    counts = _resampled_counts(len(above), draws, seed)
    below = np.broadcast_to(below, above.shape)
    width = max(1, CELLS // draws)
    blocks = [
        _bca(counts, above[:, start : start + width], below[:, start : start + width], level)
        for start in range(0, above.shape[1], width)
    ]
    low, high = np.concatenate(blocks, axis=1)
    return Estimate(
        mean=above.sum(axis=0) / below.sum(axis=0),
        low=low,
        high=high,
        se=np.sqrt(_squared_se(_influence(above, below))),
        level=level,
        n=len(numerator),
        clusters=len(above),
    )


def _resampled_counts(clusters: int, draws: int, seed: int) -> Float[np.ndarray, "draw cluster"]:
    """How often each resample holds each cluster."""
    picks = np.random.default_rng(seed).integers(clusters, size=(draws, clusters))
    cells = picks + clusters * np.arange(draws)[:, None]
    counts = np.bincount(cells.ravel(), minlength=draws * clusters)
    return counts.reshape(draws, clusters).astype(np.float64)


def _influence(
    above: Real[np.ndarray, "cluster column"], below: Real[np.ndarray, " cluster #column"]
) -> Float[np.ndarray, "cluster column"]:
    """What each cluster pulls a ratio of sums by, to first order (Taylor linearisation)."""
    total = below.sum(axis=0)
    return (above - above.sum(axis=0) / total * below) / total


def _squared_se(influence: Float[np.ndarray, "cluster column"]) -> Float[np.ndarray, " column"]:
    clusters = len(influence)
    assert clusters > 1, "one cluster has no spread; at least 2 are needed"
    return clusters / (clusters - 1) * (influence**2).sum(axis=0)


def _bca(
    counts: Float[np.ndarray, "draw cluster"],
    above: Float[np.ndarray, "cluster column"],
    below: Float[np.ndarray, "cluster column"],
    level: float,
) -> Float[np.ndarray, "2 column"]:
    """Bias-corrected and accelerated ends (Efron 1987), acceleration by the infinitesimal jackknife (§7).

    The normal quantiles are widened to t with clusters - 1 degrees of freedom (Hesterberg 2015, The
    American Statistician 69, "expanded percentile"): a resample varies less than a sample does.
    """
    mean = above.sum(axis=0) / below.sum(axis=0)
    drawn_above, drawn_below = counts @ above, counts @ below
    drawn = np.divide(drawn_above, drawn_below, out=np.copysign(np.inf, drawn_above), where=drawn_below != 0)
    drawn.sort(axis=0)

    draws = len(counts)
    smaller = ((drawn < mean).sum(axis=0) + (drawn <= mean).sum(axis=0)) / (2 * draws)  # a tie is half
    bias = ndtri(smaller.clip(0.5 / draws, 1 - 0.5 / draws))
    influence = _influence(above, below)
    square = (influence**2).sum(axis=0)
    cube = (influence**3).sum(axis=0)
    acceleration = np.divide(cube, 6 * square**1.5, out=np.zeros(mean.shape), where=square**1.5 > 0)

    clusters = len(above)
    widen = np.sqrt(clusters / (clusters - 1))
    ends = []
    for tail, to_index in ((1 - level) / 2, np.floor), ((1 + level) / 2, np.ceil):
        shifted = bias + widen * student.ppf(tail, clusters - 1)
        corrected = ndtr(bias + shifted / np.maximum(1 - acceleration * shifted, 1e-9))
        index = to_index(corrected * (draws + 1) - 1).clip(0, draws - 1).astype(int)
        ends.append(np.take_along_axis(drawn, index[None], axis=0)[0])

    flipped = (drawn_below * below.sum(axis=0) <= 0).mean(axis=0) > (1 - level) / 2
    constant = np.sqrt(square) <= 1e-12 * np.abs(mean)  # rounding, not spread
    low, high = np.where(flipped, [[-np.inf], [np.inf]], np.stack(ends))
    return np.where(constant, mean, np.stack([low, high]))


# Two models' firing at the same onsets


@dataclass(frozen=True)
class LogOdds:
    """Log-odds ratios, one a column, with Wald intervals."""

    log_odds: Float[np.ndarray, " column"]
    se: Float[np.ndarray, " column"]
    low: Float[np.ndarray, " column"]
    high: Float[np.ndarray, " column"]
    p: Float[np.ndarray, " column"]
    """Two-sided, from log_odds / se. To describe one feature; to search many, `paired_rate_p`."""
    level: float
    clusters: int


def paired_log_odds(
    a_hits: Real[np.ndarray, "cluster column"],
    b_hits: Real[np.ndarray, "cluster column"],
    trials: Real[np.ndarray, " cluster #column"],
    *,
    level: float = 0.95,
) -> LogOdds:
    """Log odds of a minus log odds of b, pooled over clusters, with half a hit added everywhere.

    The half keeps rates of 0 and 1 finite (Haldane 1956, Anscombe 1956). Both models are read at the same
    trials. The standard error is the larger of two: the linearised one between clusters, in which what the
    models share cancels, and that of independent binomials, because few hits show no spread of clusters.
    """
    tried = trials.sum(axis=0)
    linear = np.zeros(a_hits.shape)
    log_odds, binomial = np.zeros(a_hits.shape[1]), np.zeros(a_hits.shape[1])
    for sign, hits in (1, a_hits), (-1, b_hits):
        assert np.all((hits >= 0) & (hits <= trials)), "hits must lie between 0 and trials, and be numbers"
        hit, missed = hits.sum(axis=0) + 0.5, tried - hits.sum(axis=0) + 0.5
        log_odds += sign * np.log(hit / missed)
        binomial += 1 / hit + 1 / missed
        linear += sign * _influence(hits, trials) * (1 / hit + 1 / missed) * (tried + 1)
    se = np.sqrt(np.maximum(_squared_se(linear), binomial))
    half = ndtri((1 + level) / 2) * se
    p = 2 * ndtr(-np.abs(log_odds) / se)
    return LogOdds(log_odds, se, log_odds - half, log_odds + half, p, level, len(trials))


def paired_rate_p(
    a_hits: Real[np.ndarray, "cluster column"],
    b_hits: Real[np.ndarray, "cluster column"],
    trials: Real[np.ndarray, " cluster #column"],
) -> Float[np.ndarray, " column"]:
    """Two-sided p that both models fire equally often; the one to correct by `benjamini_hochberg`.

    A t test, clusters - 1 degrees of freedom, of the clusters' paired differences in hits. The search over
    features uses it instead of the Wald p of `paired_log_odds`, which calls twenty hits in one cluster and
    none elsewhere significant (.01; here 1), and never falls under 1e-4 for a feature that fires at 5 % of
    600 onsets in one model and never in the other. Two guards for sparse counts: the difference is taken
    one hit smaller (a continuity correction), and p is at least 2 ** (1 - m), m the clusters that differ,
    because no flipping of signs over clusters attains less.

    The null is that the two models could be exchanged within every cluster. Rates that are equal while one
    model's hits all lie in few clusters break it: at 4 %, packed into a twentieth of 100 clusters, p falls
    under .001 in 2.5 % of features (sim).
    """
    difference = a_hits - b_hits
    assert np.isfinite(difference).all(), "the hits hold a NaN or an infinity"
    total, tried = difference.sum(axis=0), trials.sum(axis=0)
    spread = np.sqrt(_squared_se(_influence(difference, trials))) * tried
    excess = np.maximum(np.abs(total) - 1, 0)
    t = np.divide(excess, spread, out=np.where(excess > 0, np.inf, 0.0), where=spread > 0)
    p = 2 * student.sf(t, len(difference) - 1)
    least = 2.0 ** (1 - (difference != 0).sum(axis=0))
    return np.maximum(p, least).clip(max=1)


def benjamini_hochberg(p: Float[np.ndarray, " column"]) -> Float[np.ndarray, " column"]:
    """The q of each p: the least false discovery rate at which it is a discovery (1995)."""
    return false_discovery_control(p)


# Sampled arms


def aa_null(
    successes: Real[np.ndarray, "prompt seed"],
    trials: Real[np.ndarray, "prompt seed"],
    *,
    draws: int = 1_000,
    seed: int,
) -> Float[np.ndarray, " draw"]:
    """Differences of two rates from one unedited model: each draw takes two different seeds of every prompt.

    For arms sampled with noise of their own; arms that share noise differ by less than this null.
    """
    prompts, seeds = successes.shape
    assert seeds > 1, f"{seeds} generation of each prompt: at least 2 are needed to compare a model with itself"
    random = np.random.default_rng(seed)
    first = random.integers(seeds, size=(draws, prompts))
    second = (first + random.integers(1, seeds, size=(draws, prompts))) % seeds
    row = np.arange(prompts)
    rates = []
    for pick in first, second:
        tried = trials[row, pick].sum(axis=1)
        assert np.all(tried > 0), "a null draw holds no trial, so its rate is unknown"
        rates.append(successes[row, pick].sum(axis=1) / tried)
    return rates[0] - rates[1]


def rank_p(observed: float, null: Float[np.ndarray, " draw"]) -> float:
    """(b + 1) / (B + 1), b of the B null values being as far from zero as the observed or farther."""
    assert np.isfinite([observed, *null]).all(), "a rank needs numbers"
    return float((np.sum(np.abs(null) >= abs(observed)) + 1) / (len(null) + 1))


# Ranks


def spearman(x: Real[np.ndarray, " row"], y: Real[np.ndarray, " row"]) -> float:
    """Rank correlation."""
    for values in x, y:
        assert np.isfinite(values).all(), "a rank correlation needs numbers"
        assert np.ptp(values) > 0, "a constant has no rank correlation"
    return float(spearmanr(x, y).statistic)


def percentile_among(
    values: Real[np.ndarray, " column"], mask: Bool[np.ndarray, " column"]
) -> Float[np.ndarray, " column"]:
    """Percent of the masked values below each value, ties counted half: the alive features, say.

    `scipy.stats.percentileofscore(kind="mean")` by bisection, which needs no square matrix.
    """
    assert mask.any(), "no value is masked in: there is nothing to rank among"
    assert np.isfinite(values).all(), "a rank needs numbers"
    alive = np.sort(values[mask])
    below, upto = (np.searchsorted(alive, values, side) for side in ("left", "right"))
    return 50 * (below + upto) / len(alive)
