"""How large an effect would have been seen, and how much data it takes to see one or to rule it out."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Real
from scipy.stats import chi2, norm
from scipy.stats import t as student

from sae_steer.stats.bootstrap import cluster_sums


@dataclass(frozen=True)
class SampleSize:
    """The onsets it takes to place an effect inside a bound, and what that rests on."""

    onsets: int
    clusters: int
    """Tasks, at the onsets a task that the pilot had."""
    sd: float
    """Of the rows."""
    sd_80: float
    """Upper 80 % limit of `sd`: a pilot's own standard deviation is too small half of the time."""
    icc: float
    deff: float
    bound: float
    power: float


def icc(values: Real[np.ndarray, " row"], clusters: Int[np.ndarray, " row"]) -> float:
    """Share of the rows' variance that lies between clusters; the ANOVA estimate (Donner 1986), at least 0."""
    size, total, squares = _by_cluster(values, clusters)
    n, k = size.sum(), len(size)
    if n == k:
        return 0.0
    within = (squares.sum() - (total**2 / size).sum()) / (n - k)
    between = ((total**2 / size).sum() - total.sum() ** 2 / n) / (k - 1)
    usual = (n - (size**2).sum() / n) / (k - 1)
    spread = between + (usual - 1) * within
    return float(np.clip((between - within) / spread, 0, 1)) if spread > 0 else 0.0


def design_effect_of_mean(values: Real[np.ndarray, " row"], clusters: Int[np.ndarray, " row"]) -> float:
    """1 + (m - 1) * ICC, m the mean cluster size weighted by size (Kish 1965): how many rows count for one."""
    size, _, _ = _by_cluster(values, clusters)
    return float(1 + ((size**2).sum() / size.sum() - 1) * icc(values, clusters))


def sample_size(
    values: Real[np.ndarray, " row"], clusters: Int[np.ndarray, " row"], bound: float, *, power: float = 0.90
) -> SampleSize:
    """Onsets for two one-sided tests at .05 to find an effect of up to a quarter of the bound inside it.

    n = ((z.95 + z_power) / .75)^2 * SD_80^2 * DEFF / bound^2, which is 15.2 SD_80^2 DEFF / bound^2 at a power
    of .90 (Julious 2004, eq. 20, for an effect that is not zero).

    Args:
        values: a pilot's rows, at best the contrasts effect - share * gap.
    """
    assert bound > 0, f"a bound of {bound} has no inside"
    k = len(np.unique(clusters))
    sd, deff = float(values.std(ddof=1)), design_effect_of_mean(values, clusters)
    sd_80 = float(sd * np.sqrt((k - 1) / chi2.ppf(0.2, k - 1)))
    factor = ((norm.ppf(0.95) + norm.ppf(power)) / 0.75) ** 2
    onsets = int(np.ceil(factor * sd_80**2 * deff / bound**2))
    return SampleSize(
        onsets=onsets,
        clusters=int(np.ceil(onsets * k / len(values))),
        sd=sd,
        sd_80=sd_80,
        icc=icc(values, clusters),
        deff=deff,
        bound=bound,
        power=power,
    )


def minimum_detectable(
    se: Float[np.ndarray, "*shape"] | float,
    clusters: int,
    *,
    bound: float = 0.0,
    level: float = 0.05,
    power: float = 0.80,
) -> Float[np.ndarray, "*shape"] | float:
    """The least true effect that a one-sided test against `bound` finds with this power.

    bound + (t_(1 - level) + t_power) * se, clusters - 1 degrees of freedom (Bloom 1995).
    """
    return bound + (student.ppf(1 - level, clusters - 1) + student.ppf(power, clusters - 1)) * se


def _by_cluster(
    values: Real[np.ndarray, " row"], clusters: Int[np.ndarray, " row"]
) -> tuple[Float[np.ndarray, " cluster"], Float[np.ndarray, " cluster"], Float[np.ndarray, " cluster"]]:
    """Rows, sum and sum of squares of each cluster, the values centred."""
    centred = values - values.mean()
    stacked = np.stack([np.ones(len(values)), centred, centred**2], axis=1)
    size, total, squares = cluster_sums(stacked, clusters).T
    assert len(size) > 1, "one cluster has no spread; at least 2 are needed"
    return size, total, squares
