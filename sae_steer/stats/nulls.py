"""What chance alone would give: sign flips, sampled arms, control directions; and many p at once."""

import numpy as np
from jaxtyping import Float, Int, Real
from scipy.stats import false_discovery_control

from sae_steer.stats.bootstrap import cluster_sums


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


def rank_p(
    observed: float | Real[np.ndarray, "*shape"], null: Real[np.ndarray, " draw"]
) -> float | Float[np.ndarray, "*shape"]:
    """(b + 1) / (B + 1), b of the B null values being as far from zero as the observed or farther.

    A number for a number, an array for an array (Phipson and Smyth 2010, "Permutation p-values should never
    be zero").
    """
    assert np.isfinite(observed).all(), "a rank needs numbers"
    assert np.isfinite(null).all(), "a rank needs numbers"
    nearer = np.searchsorted(np.sort(np.abs(null)), np.abs(observed), side="left")
    p = (len(null) - nearer + 1) / (len(null) + 1)
    return p if np.ndim(observed) else float(p)


def sign_flip_p(
    values: Real[np.ndarray, "row column"],
    clusters: Int[np.ndarray, " row"],
    *,
    draws: int = 10_000,
    seed: int,
) -> Float[np.ndarray, " column"]:
    """Two-sided p that each column's mean is zero, from flipping the signs of whole clusters' sums.

    Exact at any cluster sizes if every cluster's sum is as likely as its negative, because the flipped sums
    keep their own size. All columns share the flips; the unflipped data count as one of them.
    """
    sums = cluster_sums(values, clusters)
    observed = np.abs(sums.sum(axis=0))
    signs = np.random.default_rng(seed).integers(2, size=(draws, len(sums))) * 2.0 - 1.0
    rounding = 1e-9 * np.abs(sums).sum(axis=0)  # a flip that restores the data sums in another order
    reached = (np.abs(signs @ sums) >= observed - rounding).sum(axis=0)
    return (reached + 1) / (draws + 1)


def holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """The p of each test, adjusted so that any one below .05 is wrong in 5 % of families (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = stepped.clip(max=1)
    return adjusted


def benjamini_hochberg(p: Float[np.ndarray, " column"]) -> Float[np.ndarray, " column"]:
    """The q of each p: the least false discovery rate at which it is a discovery (1995)."""
    return false_discovery_control(p)
