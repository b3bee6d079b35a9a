"""Readings as numbers for a record: means with intervals over tasks, shares of the gap, side effects, ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from sae_steer import stats
from sae_steer.edits.arms import FRESH
from sae_steer.effects.measure import OnsetRows, Reading
from sae_steer.effects.readings import EDIT, ArmReading
from sae_steer.settings import LEVEL, Draws, InterveneSettings

LEAST_MASS = 0.001
"""Baseline mass under which log-odds are not read: there they say little that anyone could observe."""
RANKED = 99
"""Members from which a control family is ranked against, unless fewer are asked for; a smaller one is shown."""
FEWEST_RANKED = round(1 / LEVEL) - 1
"""Members without which no rank p can be as small as the level, so that none is ever ranked against fewer."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A mean change of the measure over onsets, with its 95 % interval over tasks."""

    mean: float
    low: float
    high: float
    prompt_weighted: float
    """The mean in which every prompt counts alike."""
    n: int
    """Onsets."""
    tasks: int
    share: float | None = None
    """Of the gap between the models; None where the gap is not asked for, or cannot be told from zero."""
    share_low: float | None = None
    share_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class EditEffect(Effect):
    """What one direction at one dose did, how far it moved the stream, and its side effects."""

    dose: float
    mean_delivered_norm: float
    rows_edited: int
    """Onsets at which the stream was moved at all."""
    coverage: float
    """Their share."""
    mean_where_edited: float | None
    """The mean over these alone; None if there are none."""
    where_edited_low: float | None
    """Of its interval; None on too few tasks for one."""
    where_edited_high: float | None
    tasks_edited: int
    log_odds: float | None
    """Mean change of a probability's log-odds, where the baseline holds a thousandth."""
    log_odds_rows: int
    kl: float
    """From the unedited prediction, nats."""
    off_target_nats: float | None
    """Mean change of the cross-entropy among the tokens outside the target set, where one of them follows."""
    off_target_rows: int


@dataclass(frozen=True, kw_only=True)
class DoseCurve:
    """An edit at every dose it was read at, and the directions read beside it at the primary one."""

    n: int
    tasks: int
    doses: tuple[EditEffect, ...]
    beside: Mapping[str, EditEffect]

    def at(self, dose: float) -> EditEffect:
        """The edit at one of the doses."""
        return next(effect for effect in self.doses if effect.dose == dose)


@dataclass(frozen=True)
class RibbonEnds:
    """How far a few control directions of a family reach at one dose."""

    dose: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class ControlFamily:
    """What the control directions of one family did at the primary dose, and where the edit ranks among them."""

    family: str
    count: int
    """Directions read."""
    planned: int
    """Directions there are: more than were read where reading the others could change no verdict."""
    ranked: bool
    """Whether they are enough to rank against."""
    low: float
    """Of the middle 95 % of the means."""
    high: float
    rank_p: float
    means: tuple[float, ...]
    ribbon: tuple[RibbonEnds, ...]
    """At the other doses."""


@dataclass(frozen=True)
class TaskMean:
    """The mean effect at the onsets of one task."""

    task: int
    n: int
    mean: float


def estimates(
    effect: Float[np.ndarray, "row column"],
    onsets: OnsetRows,
    draws: Draws,
    gap: Float[np.ndarray, " row"] | None = None,
) -> list[Effect]:
    """Per column: the onset-weighted mean with its interval, the prompt-weighted mean, the share of the gap.

    The share is None where the models' gap cannot be told from zero, for then its interval has no ends either.
    """
    points = stats.cluster_bootstrap(effect, onsets.task, **vars(draws))
    _, prompt, count = np.unique(onsets.prompt, return_inverse=True, return_counts=True)
    by_prompt = np.average(effect, axis=0, weights=1 / count[prompt])
    shares = np.full((3, effect.shape[1]), np.nan)
    if gap is not None and gap.sum():
        share = stats.cluster_bootstrap_ratio(effect, gap[:, None], onsets.task, **vars(draws))
        bounded = np.isfinite(share.low) & np.isfinite(share.high)
        shares = np.where(bounded, np.stack([share.mean, share.low, share.high]), np.nan)
    return [
        Effect(
            mean=float(points.mean[column]),
            low=float(points.low[column]),
            high=float(points.high[column]),
            prompt_weighted=float(by_prompt[column]),
            n=points.n,
            tasks=points.clusters,
            share=finite(shares[0, column]),
            share_low=finite(shares[1, column]),
            share_high=finite(shares[2, column]),
        )
        for column in range(effect.shape[1])
    ]


def finite(value: float) -> float | None:
    """None for what is unbounded or unknown: JSON has no infinity."""
    return float(value) if np.isfinite(value) else None


def dose_curve(
    reading: ArmReading,
    mode: str,
    onsets: OnsetRows,
    gap: Float[np.ndarray, " row"],
    settings: InterveneSettings,
    *,
    probability: bool,
) -> DoseCurve:
    """The dose curve of the edit, and the directions read beside it at the primary dose.

    Args:
        probability: whether the measure is one, and so has log-odds.
    """
    values, columns = reading.readings[mode], reading.columns[mode]
    effect = values.value[:, 1 : 1 + len(columns)] - values.value[:, :1]
    doses = []
    beside = {}
    for number, estimate in enumerate(estimates(effect, onsets, settings.resampling, gap)):
        direction, dose = columns[number]
        moved = values.delivered[:, number + 1] > 0
        edit_effect = EditEffect(
            **vars(estimate),
            dose=dose,
            mean_delivered_norm=float(values.delivered[:, number + 1].mean()),
            rows_edited=int(moved.sum()),
            coverage=float(moved.mean()),
            **_where_edited(effect[:, number], moved, onsets, settings),
            **_side_effects(values, number + 1, probability=probability),
        )
        if direction == EDIT:
            doses.append(edit_effect)
        else:
            beside[direction] = edit_effect
    return DoseCurve(n=len(onsets), tasks=onsets.tasks, doses=tuple(doses), beside=beside)


def _where_edited(
    effect: Float[np.ndarray, " row"], moved: Bool[np.ndarray, " row"], onsets: OnsetRows, settings: InterveneSettings
) -> dict:
    """The mean over the rows that an edit moved, with its interval where there are tasks enough for one."""
    task = onsets.task[moved]
    tasks = len(np.unique(task))
    mean, low, high = (float(effect[moved].mean()) if moved.any() else None), None, None
    if tasks >= settings.min_tasks:
        estimate = stats.cluster_bootstrap(effect[moved, None], task, **vars(settings.resampling))
        mean, low, high = float(estimate.mean[0]), float(estimate.low[0]), float(estimate.high[0])
    return {"mean_where_edited": mean, "where_edited_low": low, "where_edited_high": high, "tasks_edited": tasks}


def _side_effects(reading: Reading, column: int, *, probability: bool) -> dict:
    """Log-odds of a probability where the baseline holds a thousandth, KL, and what becomes of the other tokens."""
    base, value = reading.value[:, 0], reading.value[:, column]
    defined = probability & (base >= LEAST_MASS) & (base < 1) & (value > 0) & (value < 1)
    odds = [np.log(p[defined]) - np.log1p(-p[defined]) for p in (base, value)]
    others = reading.off_target[:, column] - reading.off_target[:, 0]
    followed = np.isfinite(others)
    return {
        "log_odds": float((odds[1] - odds[0]).mean()) if defined.any() else None,
        "log_odds_rows": int(defined.sum()),
        "kl": float(reading.kl[:, column].mean()),
        "off_target_nats": float(others[followed].mean()) if followed.any() else None,
        "off_target_rows": int(followed.sum()),
    }


def control_families(
    observed: float,
    families: Mapping[tuple[str, float], Float[np.ndarray, " _direction"]],
    settings: InterveneSettings,
    planned: Mapping[str, int] | None = None,
) -> tuple[ControlFamily, ...]:
    """Per family: the means of its directions at the primary dose, the edit's rank among them, the other doses.

    Args:
        observed: the edit's own mean effect over the same rows.
        families: mean effects of control directions by (family, dose).
        planned: sizes of families that were read until the rank was decided: the p of the one that decided it is above
            the level, as the whole family's would be; those of others cut short with it say nothing by themselves.
    """
    primary = settings.primary_dose
    return tuple(
        _family(observed, name, families, primary, settings, len(means) if planned is None else planned[name])
        for (name, dose), means in families.items()
        if dose == primary and name != FRESH
    )


def _family(
    observed: float,
    name: str,
    families: Mapping[tuple[str, float], Float[np.ndarray, " _direction"]],
    primary: float,
    settings: InterveneSettings,
    planned: int,
) -> ControlFamily:
    means = families[name, primary]
    low, high = np.quantile(means, [0.025, 0.975])
    ribbon = [
        RibbonEnds(dose, float(few.min()), float(few.max()), len(few))
        for (family, dose), few in families.items()
        if family == name and dose != primary
    ]
    return ControlFamily(
        family=name,
        count=len(means),
        planned=planned,
        ranked=is_ranked(planned, settings),
        low=float(low),
        high=float(high),
        rank_p=stats.rank_p(observed, means),
        means=tuple(means.tolist()),
        ribbon=tuple(sorted(ribbon, key=lambda ends: ends.dose)),
    )


def is_ranked(count: int, settings: InterveneSettings) -> bool:
    """Whether a family is large enough to rank against."""
    return count >= max(FEWEST_RANKED, min(RANKED, settings.controls))


def least_rank(observed: float, means: Float[np.ndarray, " direction"], planned: int) -> float:
    """The rank p if none of the members not yet read went as far as the edit."""
    return stats.rank_p(observed, np.append(means, np.zeros(planned - len(means))))


def is_outranked(
    observed: float,
    families: Mapping[str, Float[np.ndarray, " _direction"]],
    planned: Mapping[str, int],
    settings: InterveneSettings,
) -> bool:
    """Whether the members read so far rule out that the edit is special, whatever the others do.

    The edit is special if its rank p is at most the level in every family that is ranked. A member not read yet can
    only raise that p or leave it, and leaves it if it does nothing (`least_rank`). So as soon as that least p of one
    ranked family is above the level, no further reading can change the answer.
    """
    for name, means in families.items():
        if is_ranked(planned[name], settings) and least_rank(observed, means, planned[name]) > LEVEL:
            return True
    return False


def worst_rank(families: Sequence[ControlFamily]) -> float | None:
    """The largest rank p among the families that are ranked; None without any."""
    return max((family.rank_p for family in families if family.ranked), default=None)


def task_means(effect: Float[np.ndarray, " row"], onsets: OnsetRows) -> tuple[TaskMean, ...]:
    """The mean effect of every task, in rising order."""
    tasks, where, counts = np.unique(onsets.task, return_inverse=True, return_counts=True)
    means = np.bincount(where, effect) / counts
    order = np.argsort(means, kind="stable")
    return tuple(TaskMean(int(tasks[i]), int(counts[i]), float(means[i])) for i in order)
