"""Both models' firings at the same onsets compared, a few features at a time, so that width costs no memory."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csc_array

from sae_steer import stats

BLOCK_BYTES = 2**22
"""Counts of one model that are held densely at once; the statistics need some ten times as much."""


@dataclass(frozen=True)
class PairedFirings:
    """What the paired counts say of every feature."""

    log_odds: stats.LogOdds
    p: Float[np.ndarray, " d_sae"]
    design_effects: tuple[Float[np.ndarray, " d_sae"], Float[np.ndarray, " d_sae"]]
    """Of the target's rate and of the reference's."""


def paired_firings(target: csc_array, reference: csc_array, trials: Int[np.ndarray, " cluster"]) -> PairedFirings:
    """The statistics of `stats`, which take dense counts, over blocks of features.

    Args:
        target: [cluster, d_sae] firings.
        reference: [cluster, d_sae] firings.
    """
    tried = trials[:, None]
    odds, p, effects = [], [], []
    for a, b in _blocks(target, reference):
        odds.append(stats.paired_log_odds(a, b, tried))
        p.append(stats.paired_rate_p(a, b, tried))
        effects.append([stats.design_effect(side, tried) for side in (a, b)])
    of_target, of_reference = map(np.concatenate, zip(*effects, strict=True))
    return PairedFirings(_joined(odds), np.concatenate(p), (of_target, of_reference))


def _blocks(*sides: csc_array) -> Iterator[list[Int[np.ndarray, "cluster block"]]]:
    clusters, d_sae = sides[0].shape
    width = max(2, BLOCK_BYTES // (8 * clusters))
    for start in range(0, d_sae, width):
        yield [side[:, start : start + width].toarray(order="C").astype(np.int64) for side in sides]


def _joined(parts: list[stats.LogOdds]) -> stats.LogOdds:
    columns = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(stats.LogOdds)
        if field.name not in ("level", "clusters")
    }
    return stats.LogOdds(**columns, level=parts[0].level, clusters=parts[0].clusters)
