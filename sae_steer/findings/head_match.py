"""Which head of the target does what a head of the reference does, when nothing says that they share an index.

1. Profiles by structure (`head_profiles`) of all heads of both models, on the same texts.
2. Cosines between profiles, raw (the card's; high for any two heads, as all attend to what there is) and centred (less
   the mean profile of all heads of both models).
3. A one-to-one assignment of all heads that makes the sum of centred cosines largest (Hungarian, scipy).
4. Against chance: do the two heads of a pair vary together from task to task more than with tasks permuted; and is
   their cosine larger than with the other heads of the same layers.
5. Tasks resampled: intervals of the cosines, and how often the assignment makes the same pair.
6. The step-layout-broadcast head of each model, found by its score and not by its index.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from sae_steer import stats
from sae_steer.findings.head_profiles import HeadProfiles, Profiles
from sae_steer.settings import HeadsSettings

LEVEL = 0.95
Matrix = Float[np.ndarray, "reference_head target_head"]


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval over resampled tasks."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Float[np.ndarray, " draw"]) -> "Interval":
        """Percentiles of the resampled values."""
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True)
class HeadPair:
    """A head of the reference and a head of the target, and how alike they are."""

    reference: str
    target: str
    raw: Interval
    """Cosine of the profiles."""
    centred: Interval
    """Cosine of the profiles less the mean of all heads."""


@dataclass(frozen=True)
class Match:
    """A pair of the one-to-one assignment."""

    pair: HeadPair
    stability: float
    """Share of resamples whose assignment makes the same pair."""
    p_prompts: float
    """That the two vary together over tasks as they do, with the tasks of one permuted."""
    p_layer: float
    """Rank of their centred cosine among those with the other heads of the two layers."""


@dataclass(frozen=True)
class Broadcast:
    """The head of each model that attends most persistently to the delimiters of earlier steps."""

    reference: str
    target: str
    reference_score: Interval
    target_score: Interval
    reference_runner_up: float
    """Score of the next head."""
    target_runner_up: float
    matched: bool
    """Whether the assignment pairs the two."""
    pair: HeadPair
    same_index: tuple[HeadPair, HeadPair]
    """The pairs of equal index at the reference's head and at the target's: the card's baseline."""


@dataclass(frozen=True)
class HeadMatching:
    """All heads of two models, matched."""

    matches: tuple[Match, ...]
    broadcast: Broadcast
    same_index_raw: float
    """Mean cosine of heads of equal index."""
    same_index_centred: float
    in_place: int
    """Matched pairs of equal index."""
    in_layer: int
    """Matched pairs of the same layer."""
    raw: Matrix
    centred: Matrix


def match_heads(reference: HeadProfiles, target: HeadProfiles, settings: HeadsSettings) -> HeadMatching:
    """Match all heads of two models read on the same texts."""
    assert reference.tasks == target.tasks, "both models read the same texts"
    raw, centred = both_cosines(reference.over().profile, target.over().profile)
    pairs = assign(centred)
    draws = _resampled(reference, target, settings)
    p_prompts = _vary_together(reference, target, pairs, settings)

    def pair(a: int, b: int) -> HeadPair:
        return HeadPair(
            reference.name(a),
            target.name(b),
            Interval.of(raw[a, b], draws.raw[:, a, b]),
            Interval.of(centred[a, b], draws.centred[:, a, b]),
        )

    matches = tuple(
        Match(
            pair(a, b),
            float((draws.partner[:, a] == b).mean()),
            float(p),
            _rank_in_layers(centred, a, b, reference.n_heads, target.n_heads),
        )
        for (a, b), p in zip(pairs, p_prompts, strict=True)
    )
    names = [(reference.name(a), target.name(b)) for a, b in pairs]
    same = [(a, a) for a in range(min(raw.shape))]
    return HeadMatching(
        matches=matches,
        broadcast=_broadcast(reference, target, pairs, draws, pair),
        same_index_raw=float(np.mean([raw[at] for at in same])),
        same_index_centred=float(np.mean([centred[at] for at in same])),
        in_place=sum(a == b for a, b in names),
        in_layer=sum(a // reference.n_heads == b // target.n_heads for a, b in pairs),
        raw=raw,
        centred=centred,
    )


def both_cosines(reference: Profiles, target: Profiles) -> tuple[Matrix, Matrix]:
    """Cosines of every head of one with every head of the other: of the profiles, and of the profiles centred."""
    a, b = (part.reshape(len(part), -1) for part in (reference, target))
    mean = np.concatenate([a, b]).mean(0)
    return _cosines(a, b), _cosines(a - mean, b - mean)


def assign(similarity: Matrix) -> list[tuple[int, int]]:
    """The one-to-one pairs whose similarities have the largest sum."""
    return [(int(a), int(b)) for a, b in zip(*linear_sum_assignment(similarity, maximize=True), strict=True)]


def _cosines(a: Float[np.ndarray, "reference_head dim"], b: Float[np.ndarray, "target_head dim"]) -> Matrix:
    a, b = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in (a, b))
    return a @ b.T


@dataclass(frozen=True)
class _Draws:
    """What resampled tasks give."""

    raw: Float[np.ndarray, "draw reference_head target_head"]
    centred: Float[np.ndarray, "draw reference_head target_head"]
    partner: Int[np.ndarray, "draw reference_head"]
    """The target head assigned to each reference head; -1 for none."""
    reference_score: Float[np.ndarray, "draw reference_head"]
    target_score: Float[np.ndarray, "draw target_head"]


def _resampled(reference: HeadProfiles, target: HeadProfiles, settings: HeadsSettings) -> _Draws:
    counts = stats.resampled_counts(reference.tasks, settings.bootstrap_draws, settings.seed)
    raw, centred, partner, scores = [], [], [], []
    for drawn in counts:
        readings = [part.over(drawn) for part in (reference, target)]
        both = both_cosines(*(reading.profile for reading in readings))
        partners = np.full(both[0].shape[0], -1)
        for a, b in assign(both[1]):
            partners[a] = b
        raw.append(both[0])
        centred.append(both[1])
        partner.append(partners)
        scores.append([reading.broadcast for reading in readings])
    first, second = (np.stack(part) for part in zip(*scores, strict=True))
    return _Draws(np.stack(raw), np.stack(centred), np.stack(partner), first, second)


def _vary_together(
    reference: HeadProfiles, target: HeadProfiles, pairs: list[tuple[int, int]], settings: HeadsSettings
) -> list[float]:
    """p of each pair: the agreement of its heads' deviations, task by task, among those with one's tasks permuted."""
    a, b = (part.by_task() - part.by_task().mean(0) for part in (reference, target))
    random = np.random.default_rng([settings.seed, 71])
    orders = np.stack([random.permutation(reference.tasks) for _ in range(settings.null_draws)])
    own = np.arange(reference.tasks)
    found = []
    for head, other in pairs:
        agreement = a[:, head] @ b[:, other].T
        null = agreement[own, orders].sum(1)
        found.append((1 + int((null >= np.trace(agreement)).sum())) / (1 + len(null)))
    return found


def _rank_in_layers(centred: Matrix, a: int, b: int, own_heads: int, their_heads: int) -> float:
    """The rank of a pair's cosine among those of either head with the other's layer mates."""
    layer_a = np.arange(a // own_heads * own_heads, (a // own_heads + 1) * own_heads)
    layer_b = np.arange(b // their_heads * their_heads, (b // their_heads + 1) * their_heads)
    others = np.concatenate([centred[a, layer_b[layer_b != b]], centred[layer_a[layer_a != a], b]])
    return (1 + int((others >= centred[a, b]).sum())) / (1 + len(others))


def _broadcast(reference: HeadProfiles, target: HeadProfiles, pairs, draws: _Draws, pair) -> Broadcast:
    scores = [part.over().broadcast for part in (reference, target)]
    a, b = (int(score.argmax()) for score in scores)
    first, second = (np.sort(score)[-2] if len(score) > 1 else np.nan for score in scores)
    limit = min(len(scores[0]), len(scores[1])) - 1
    return Broadcast(
        reference=reference.name(a),
        target=target.name(b),
        reference_score=Interval.of(scores[0][a], draws.reference_score[:, a]),
        target_score=Interval.of(scores[1][b], draws.target_score[:, b]),
        reference_runner_up=float(first),
        target_runner_up=float(second),
        matched=(a, b) in pairs,
        pair=pair(a, b),
        same_index=(pair(a, min(a, limit)), pair(min(b, limit), b)),
    )
