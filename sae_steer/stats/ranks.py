"""Where values stand among others."""

import numpy as np
from jaxtyping import Bool, Float, Real
from scipy.stats import spearmanr


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
