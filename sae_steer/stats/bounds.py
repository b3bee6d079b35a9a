"""An effect against a bound fixed beforehand, because a difference from zero is no finding.

The bound is a share of the gap between the two models at the same rows, and never above a cap. A gap that is
estimated brings noise of its own, so the effect is compared row by row: d = effect - share * gap. A bound
put in as a number from another split has a level of up to .37, the contrast .05 (sim).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from sae_steer.errors import InputError
from sae_steer.stats.bootstrap import Estimate, cluster_bootstrap

BOUND_SHARE = 0.05
"""Of the gap between the models."""
BOUND_CAP = 0.012
"""Largest bound, as a probability."""
MIN_CLUSTERS = 30
"""Fewer carry no interval."""
MIN_CLUSTERS_FOR_NULL = 100
"""Fewer carry no null."""


def check_clusters(clusters: Int[np.ndarray, " row"], what: str = "tasks") -> int:
    """How many clusters the rows come from; an `InputError` if they are too few for an interval."""
    count = len(np.unique(clusters))
    if count < MIN_CLUSTERS:
        raise InputError(
            f"the rows come from {count} {what}; intervals over {what} need {MIN_CLUSTERS}, and a null "
            f"{MIN_CLUSTERS_FOR_NULL}: add texts of more {what}"
        )
    return count


@dataclass(frozen=True)
class AgainstBound:
    """Effects, one a column, compared with the bound on either side."""

    effect: Estimate
    gap: Estimate
    share: float
    cap: float
    less_share: Estimate
    """effect - share * gap."""
    plus_share: Estimate
    """effect + share * gap."""
    less_cap: Estimate
    plus_cap: Estimate

    @property
    def bound(self) -> Float[np.ndarray, " column"]:
        """min(share * gap, cap) at the estimated gap, for people and figures; no test plugs it in."""
        return np.minimum(self.share * self.gap.mean, self.cap)

    @property
    def clusters(self) -> int:
        """Clusters behind every number."""
        return self.effect.clusters

    @cached_property
    def p_above(self) -> Float[np.ndarray, " column"]:
        """One-sided p that the effect is not above the bound (minimum-effect test)."""
        return self._decisive(self.less_share.p_above, self.less_cap.p_above)

    @cached_property
    def p_below(self) -> Float[np.ndarray, " column"]:
        """One-sided p that the effect is not below minus the bound."""
        return self._decisive(self.plus_share.p_below, self.plus_cap.p_below)

    @cached_property
    def p_inside(self) -> Float[np.ndarray, " column"]:
        """p of equivalence: the largest of the one-sided p, against both ends of both bounds (Schuirmann 1987)."""
        sides = (self.less_share.p_below, self.less_cap.p_below, self.plus_share.p_above, self.plus_cap.p_above)
        return np.max(sides, axis=0)

    def beyond(self, sign: int, level: float = 0.05) -> Bool[np.ndarray, " column"]:
        """Where the effect lies beyond the bound on the side of `sign`."""
        return (self.p_above if sign > 0 else self.p_below) < level

    def inside(self, level: float = 0.05) -> Bool[np.ndarray, " column"]:
        """Where the 1 - 2 * level interval lies inside the bound; never with too few clusters for a null."""
        return (self.p_inside < level) & (self.clusters >= MIN_CLUSTERS_FOR_NULL)

    def nearer(self, sign: int) -> Estimate:
        """effect - bound (`sign` > 0) or effect + bound, by the bound that is smaller at the estimated gap.

        Its columns must agree on which that is, as those of one gap do.
        """
        capped = np.unique(self.share * self.gap.mean > self.cap)
        assert len(capped) == 1, "the columns have gaps on both sides of the cap; compare them one by one"
        if sign > 0:
            return self.less_cap if capped[0] else self.less_share
        return self.plus_cap if capped[0] else self.plus_share

    def _decisive(self, by_share: np.ndarray, by_cap: np.ndarray) -> Float[np.ndarray, " column"]:
        """The p against the smaller bound; against both where the gap's interval leaves open which that is.

        Taking the smaller of the two estimates would pick the easier test; there they are all but equal.
        """
        both = np.maximum(by_share, by_cap)
        cap_is_smaller, share_is_smaller = self.share * self.gap.low > self.cap, self.share * self.gap.high < self.cap
        return np.select([cap_is_smaller, share_is_smaller], [by_cap, by_share], both)


def against_bound(
    effect: Real[np.ndarray, "row column"],
    gap: Real[np.ndarray, " row #column"],
    clusters: Int[np.ndarray, " row"],
    *,
    share: float = BOUND_SHARE,
    cap: float = BOUND_CAP,
    weights: Real[np.ndarray, " row"] | None = None,
    draws: int = 10_000,
    level: float = 0.90,
    seed: int,
) -> AgainstBound:
    """Compare mean effects with min(share * mean gap, cap) on the same rows.

    All contrasts share the resamples. `InputError` under 30 clusters. The gap is taken as target minus
    reference; where its mean is negative, the bound is a share of its size.

    Args:
        level: of the intervals; .90 is that of two one-sided tests at .05.
    """
    check_clusters(clusters)
    columns = effect.shape[1]
    signed = np.broadcast_to(gap, effect.shape)
    part = share * signed * np.where(signed.mean(axis=0) < 0, -1, 1)
    stacked = np.concatenate([effect, effect - part, effect + part, effect - cap, effect + cap], axis=1)
    settings = {"draws": draws, "level": level, "seed": seed, "weights": weights}
    every = cluster_bootstrap(stacked, clusters, **settings)
    pieces = [_columns(every, slice(start, start + columns)) for start in range(0, 5 * columns, columns)]
    size = cluster_bootstrap(part / share if share else np.abs(signed), clusters, **settings | {"level": 0.95})
    return AgainstBound(pieces[0], size, share, cap, *pieces[1:])


def _columns(estimate: Estimate, which: slice) -> Estimate:
    vectors = ("mean", "low", "high", "se", "p_above", "p_below")
    parts = {name: getattr(estimate, name)[which] for name in vectors}
    return Estimate(**parts, level=estimate.level, n=estimate.n, clusters=estimate.clusters)
