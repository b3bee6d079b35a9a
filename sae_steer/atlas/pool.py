"""One pool of control directions that all features of an atlas are ranked in, each at its own length.

**The null.** A feature's statistic is the mean effect of its edit over the ranked onsets. A null value is the same
number for a control direction: the same onsets, moved with the same sign and at each onset by the same length, that
is in the feature's own norm bin. p = (b + 1) / (B + 1), b of the B controls being as far from zero or farther.

**The controls** are all different, a third each: decoder rows of features that are not tested,
without those at |cosine| above .3 to the feature; draws from the covariance of the edited stream at onsets; and
isotropic directions, which also make up for what the others lack. None is a resample of another, so B directions
claim no p below 1 / (B + 1).

**What it needs**: that a direction which does nothing special is exchangeable with a draw from this mixture, given the
onsets and lengths. Nothing is asked of the effects' distribution. Against any one third a p is at most three times
the pooled one. All tests share the pool, so their p depend on one another positively; ranks in one shared sample keep
Benjamini-Hochberg's level (Bates et al. 2023, Annals of Statistics 51, 149). The onsets are held fixed: a p says
nothing of other tasks; the interval against the bound does.

**Lengths.** Each control is read at a few lengths, the edges of the norm bins, and its mean effect at any other is the
polynomial through these and through zero: smooth functions of one number. How far that is from the exact effect
is measured on some controls at lengths between.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer import stats
from sae_steer.edits.controls import MAX_COSINE, covariance_matched, isotropic
from sae_steer.randomness import Stream, generator, random_numbers

CHECKED = 48
"""Controls on which the interpolation is checked, about."""


@dataclass(frozen=True)
class Pool:
    """Control directions of one edited stream."""

    units: Float[Tensor, "control d_model"]
    """Of length one."""
    allowed: Bool[np.ndarray, "feature control"]
    """Which of them each tested feature is ranked among."""
    counts: dict[str, int]
    """By family."""

    @property
    def checks(self) -> slice:
        """Some of all families, evenly spaced, on which the interpolation is checked."""
        return slice(None, None, max(1, len(self.units) // CHECKED))


def draw_pool(
    tested: Float[Tensor, "feature d_dictionary"],
    others: Float[Tensor, "other d_dictionary"],
    carried: Float[Tensor, "other d_model"],
    stream: Float[np.ndarray, "onset d_model"],
    *,
    count: int,
    seed: int,
) -> Pool:
    """Controls for the tested features, `count` at least for each of them.

    Args:
        tested: the features' units in the dictionary's own stream, where cosines are taken.
        others: decoder rows of features that may be controls, of length one, and `carried` into the edited stream.
        stream: the edited stream at onsets.
    """
    # a third are decoder rows, or as many as there are
    chosen = random_numbers(seed, Stream.ATLAS_FEATURES).permutation(len(others))[: count // 3]
    row = torch.from_numpy(chosen)
    near = ((tested @ others[row.to(others.device)].T).abs() > MAX_COSINE).cpu().numpy()
    # half of what is left is drawn from the covariance
    covariance = (count - len(chosen)) // 2
    # isotropic draws fill up to `count`, and stand in for the decoder rows that are too near to some feature
    most_left_out = int(near.sum(axis=1).max(initial=0))
    rest = count - len(chosen) - covariance + most_left_out
    units = torch.cat(
        [
            carried[row.to(carried.device)],
            covariance_matched(stream, covariance, seed).to(carried.device),
            isotropic(rest, stream.shape[1], generator(seed, Stream.ATLAS_ISOTROPIC)).to(carried.device),
        ]
    )
    allowed = np.ones((len(tested), len(units)), dtype=bool)
    allowed[:, : len(chosen)] = ~near
    return Pool(units, allowed, {"decoder rows": len(chosen), "covariance": covariance, "isotropic": rest})


def ranked_onsets(
    task: Int[np.ndarray, " row"], fires: Bool[np.ndarray, "row feature"], *, count: int, firings: int, seed: int
) -> tuple[Int[np.ndarray, " ranked"], int]:
    """Onsets at which controls are read, and how many of them rank every variant; the others are for ablation alone.

    The first are `count`, of as many tasks as there are. After them come the fewest, found one by one, that let every
    feature fire at `firings` of all, or wherever it fires.
    """
    # one onset of every task in turn, in random order, then whatever is left
    order = random_numbers(seed, Stream.ATLAS_ONSETS).permutation(len(task))
    first_of_task = np.sort(np.unique(task[order], return_index=True)[1])
    spread = np.concatenate([order[first_of_task], np.delete(order, first_of_task)])[:count]
    # greedily the onset at which most of the features that still lack firings do fire
    left = fires.copy()
    left[spread] = False
    lacking = firings - fires[spread].sum(axis=0)
    more: list[int] = []
    while (gain := left[:, lacking > 0].sum(axis=1)).any():
        more.append(int(gain.argmax()))
        lacking = lacking - left[more[-1]]
        left[more[-1]] = False
    return np.concatenate([spread, np.array(more, dtype=spread.dtype)]), len(spread)


def norm_bins(lengths: Float[np.ndarray, " length"], count: int) -> Float[np.ndarray, " norm"]:
    """`count` lengths up to the largest at which controls are read."""
    return lengths.max() * np.arange(1, count + 1) / count


def between(
    lengths: Float[np.ndarray, "*shape"], norms: Float[np.ndarray, " norm"]
) -> Float[np.ndarray, "*shape norm"]:
    """Weights of the readings at `norms` that give the reading at each length: Lagrange's, with zero at zero."""
    nodes = np.concatenate([[0.0], norms])
    return np.stack(
        [
            np.prod([(lengths - other) / (node - other) for j, other in enumerate(nodes) if j != i], axis=0)
            for i, node in enumerate(nodes)
            if i
        ],
        axis=-1,
    )


@dataclass(frozen=True)
class NullDraws:
    """A variant's features among the controls."""

    observed: Float[np.ndarray, " feature"]
    """The features' own statistic: the mean effect over the ranked onsets."""
    p: Float[np.ndarray, " feature"]
    outdone: Bool[np.ndarray, " feature"]
    """Whether any control goes as far as the feature."""
    low: Float[np.ndarray, " feature"]
    """Of the middle 95 % of the null values, in the measure's unit."""
    high: Float[np.ndarray, " feature"]
    fewest: int
    """Null values of the feature that has fewest."""
    pooled: tuple[float, float]
    """The middle 95 % of all features' null values."""


def rank_among(
    observed: Float[np.ndarray, " feature"],
    weights: Float[np.ndarray, "feature ranked norm"],
    read: Float[np.ndarray, "ranked norm control"],
    allowed: Bool[np.ndarray, "feature control"],
) -> NullDraws:
    """Each feature's statistic among its null values, which are `weights` times what the controls did."""
    null = np.einsum("frn,rnc->fc", weights, read, optimize=True)
    draws = [values[mine] for values, mine in zip(null, allowed, strict=True)]
    ends = np.array([np.quantile(values, [0.025, 0.975]) for values in draws])
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975])
    return NullDraws(
        observed=observed,
        p=np.array([stats.rank_p(float(value), values) for value, values in zip(observed, draws, strict=True)]),
        outdone=np.array([(np.abs(v) >= abs(own)).any() for own, v in zip(observed, draws, strict=True)]),
        low=ends[:, 0],
        high=ends[:, 1],
        fewest=min(map(len, draws)),
        pooled=(float(low), float(high)),
    )
