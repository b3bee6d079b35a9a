"""Gradient times activation: what an edit of one onset would do if the measure were linear in the stream there.

To first order an edit changes the measure at its own onset by gradient . change, so one backward pass over the
texts estimates every feature at once (attribution patching, Syed et al. 2023, 2310.10348). It misses what bends: the
norms, the softmax of the measure and of attention. How much that is stands beside it, on the features measured exactly.
"""

import numpy as np
from jaxtyping import Float

from sae_steer import stats
from sae_steer.sae.codes import SparseCodes

FEWEST = 3
"""Features from which a correlation says anything."""


def added(
    gradient: Float[np.ndarray, "onset d_model"], shifts: Float[np.ndarray, "feature d_model"]
) -> Float[np.ndarray, " feature"]:
    """The estimated mean effect of adding each shift at every onset: shift . mean gradient."""
    return shifts @ gradient.mean(axis=0)


def ablated(
    gradient: Float[np.ndarray, "onset d_model"], codes: SparseCodes, decoder: Float[np.ndarray, "d_sae d_model"]
) -> Float[np.ndarray, " d_sae"]:
    """The estimated mean effect of taking every feature's contribution f * W_dec away: -mean(f * W_dec . gradient)."""
    values, index, row = (part.cpu().numpy() for part in (codes.values, codes.indices, codes.rows))
    slopes = np.einsum("cd,cd->c", gradient[row], decoder[index])
    return -np.bincount(index, values * slopes, len(decoder)) / len(gradient)


def error(estimate: Float[np.ndarray, " feature"], exact: Float[np.ndarray, " feature"]) -> dict:
    """How far estimates are from the exact effects: correlations over features, and the median relative error."""
    moved = exact != 0
    enough = len(exact) >= FEWEST and np.ptp(exact) > 0 and np.ptp(estimate) > 0
    relative = np.abs(estimate[moved] - exact[moved]) / np.abs(exact[moved])
    return {
        "n": len(exact),
        "correlation": float(np.corrcoef(estimate, exact)[0, 1]) if enough else None,
        "rank_correlation": stats.spearman(estimate, exact) if enough else None,
        "median_relative_error": float(np.median(relative)) if moved.any() else None,
    }
