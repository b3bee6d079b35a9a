"""Readings as numbers for a record: means with intervals over tasks, shares of the gap, side effects, ranks."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from sae_steer import stats
from sae_steer.edits.arms import FRESH
from sae_steer.effects.measure import OnsetRows, Reading
from sae_steer.effects.readings import EDIT, ArmReading
from sae_steer.settings import LEVEL, InterveneSettings

LEAST_MASS = 0.001
"""Baseline mass under which log-odds are not read: there they say little that anyone could observe."""
RANKED = 99
"""Members from which a control family is ranked against, unless fewer are asked for; a smaller one is shown."""
FEWEST_RANKED = round(1 / LEVEL) - 1
"""Members without which no rank p can be as small as the level, so that none is ever ranked against fewer."""


def estimates(
    effect: Float[np.ndarray, "row column"],
    onsets: OnsetRows,
    settings: InterveneSettings,
    gap: Float[np.ndarray, " row"] | None = None,
) -> list[dict]:
    """Per column: the onset-weighted mean with its interval, the prompt-weighted mean, the share of the gap.

    The share is None where the models' gap cannot be told from zero, for then its interval has no ends either.
    """
    draws = {"draws": settings.bootstrap_draws, "seed": settings.seed}
    points = stats.cluster_bootstrap(effect, onsets.task, **draws)
    _, prompt, count = np.unique(onsets.prompt, return_inverse=True, return_counts=True)
    by_prompt = np.average(effect, axis=0, weights=1 / count[prompt])
    rows = [
        {
            "mean": float(mean),
            "low": float(low),
            "high": float(high),
            "prompt_weighted": float(weighted),
            "n": points.n,
            "tasks": points.clusters,
        }
        for mean, low, high, weighted in zip(points.mean, points.low, points.high, by_prompt, strict=True)
    ]
    if gap is None:
        return rows
    shares = np.full((3, len(rows)), np.nan)
    if gap.sum():
        share = stats.cluster_bootstrap_ratio(effect, gap[:, None], onsets.task, **draws)
        known = np.isfinite(share.low) & np.isfinite(share.high)
        shares = np.where(known, np.stack([share.mean, share.low, share.high]), np.nan)
    for row, ends in zip(rows, shares.T, strict=True):
        row |= {key: finite(value) for key, value in zip(("share", "share_low", "share_high"), ends, strict=True)}
    return rows


def finite(value: float) -> float | None:
    """None for what is unbounded or unknown: JSON has no infinity."""
    return float(value) if np.isfinite(value) else None


def mode_record(
    found: ArmReading,
    mode: str,
    onsets: OnsetRows,
    gap: Float[np.ndarray, " row"],
    settings: InterveneSettings,
    *,
    probability: bool,
) -> dict:
    """The dose curve of the edit, and the directions read beside it at the primary dose.

    Args:
        probability: whether the measure is one, and so has log-odds.
    """
    reading, columns = found.readings[mode], found.columns[mode]
    effect = reading.value[:, 1 : 1 + len(columns)] - reading.value[:, :1]
    rows = estimates(effect, onsets, settings, gap)
    doses, beside = [], {}
    for column, ((direction, dose), row) in enumerate(zip(columns, rows, strict=True), 1):
        moved = reading.delivered[:, column] > 0
        row |= {
            "mean_delivered_norm": float(reading.delivered[:, column].mean()),
            "rows_edited": int(moved.sum()),
            "coverage": float(moved.mean()),
            **_where_edited(effect[moved, column - 1], onsets.task[moved], settings),
            **_side_effects(reading, column, probability=probability),
        }
        if direction == EDIT:
            doses.append({"dose": dose, **row})
        else:
            beside[direction] = row
    return {"n": len(onsets), "tasks": onsets.tasks, "doses": doses, "beside": beside}


def _where_edited(effect: Float[np.ndarray, " moved"], task: np.ndarray, settings: InterveneSettings) -> dict:
    """The mean over the rows that an edit moved, with its interval where there are tasks enough for one."""
    keys, tasks = ("mean_where_edited", "where_edited_low", "where_edited_high"), len(np.unique(task))
    if tasks < settings.min_tasks:
        means = (float(effect.mean()) if len(effect) else None, None, None)
    else:
        found = stats.cluster_bootstrap(effect[:, None], task, draws=settings.bootstrap_draws, seed=settings.seed)
        means = (float(found.mean[0]), float(found.low[0]), float(found.high[0]))
    return {**dict(zip(keys, means, strict=True)), "tasks_edited": tasks}


def _side_effects(reading: Reading, column: int, *, probability: bool) -> dict:
    """Log-odds of a probability where the baseline holds a thousandth, KL, and what becomes of the other tokens."""
    base, value = reading.value[:, 0], reading.value[:, column]
    defined = probability & (base >= LEAST_MASS) & (base < 1) & (value > 0) & (value < 1)
    odds = [np.log(p[defined]) - np.log1p(-p[defined]) for p in (base, value)]
    others = reading.off_target[:, column] - reading.off_target[:, 0]
    known = np.isfinite(others)
    return {
        "log_odds": float((odds[1] - odds[0]).mean()) if defined.any() else None,
        "log_odds_rows": int(defined.sum()),
        "kl": float(reading.kl[:, column].mean()),
        "off_target_nats": float(others[known].mean()) if known.any() else None,
        "off_target_rows": int(known.sum()),
    }


def control_records(
    observed: float,
    families: Mapping[tuple[str, float], Float[np.ndarray, " _direction"]],
    settings: InterveneSettings,
    planned: Mapping[str, int] | None = None,
) -> list[dict]:
    """Per family: the means of its directions at the primary dose, the edit's rank among them, the other doses.

    Args:
        observed: the edit's own mean effect over the same rows.
        families: mean effects of control directions by (family, dose).
        planned: sizes of families that were read until the rank was decided: the p of the one that decided it is above
            the level, as the whole family's would be; those of others cut short with it say nothing by themselves.
    """
    primary, found = settings.primary_dose, []
    for (name, dose), means in families.items():
        if dose != primary or name == FRESH:
            continue
        ribbon = [
            {"dose": other, "low": float(ends.min()), "high": float(ends.max()), "count": len(ends)}
            for (family, other), ends in families.items()
            if family == name and other != primary
        ]
        low, high = np.quantile(means, [0.025, 0.975])
        size = len(means) if planned is None else planned[name]
        found.append(
            {
                "family": name,
                "count": len(means),
                "planned": size,
                "ranked": is_ranked(size, settings),
                "low": float(low),
                "high": float(high),
                "rank_p": stats.rank_p(observed, means),
                "means": means.tolist(),
                "ribbon": sorted(ribbon, key=lambda row: row["dose"]),
            }
        )
    return found


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
    """Whether a family that counts forbids a special effect, whatever its members that are not read yet do."""
    return any(
        is_ranked(planned[name], settings) and least_rank(observed, means, planned[name]) > LEVEL
        for name, means in families.items()
    )


def worst_rank(records: Sequence[Mapping]) -> float | None:
    """The largest rank p among the families that are ranked; None without any."""
    return max((record["rank_p"] for record in records if record["ranked"]), default=None)


def task_means(effect: Float[np.ndarray, " row"], onsets: OnsetRows) -> list[dict]:
    """The mean effect of every task, in rising order."""
    tasks, where, counts = np.unique(onsets.task, return_inverse=True, return_counts=True)
    means = np.bincount(where, effect) / counts
    order = np.argsort(means, kind="stable")
    return [{"task": int(tasks[i]), "n": int(counts[i]), "mean": float(means[i])} for i in order]
