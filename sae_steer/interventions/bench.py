"""The exact effects of one feature's variants: every dose, one onset at a time and all of a text together.

Effects are estimated with intervals that resample tasks; random directions of the length that the feature's
own edit delivers show what any vector of that size would do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sae_steer import stats
from sae_steer.errors import SteerError
from sae_steer.interventions.edits import Control, isotropic
from sae_steer.interventions.measure import OnsetRows, Reading, Request, check_delivered, read, unedited
from sae_steer.interventions.variants import FeatureEdit, Variant
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text
from sae_steer.runtime import generator
from sae_steer.settings import InterveneSettings

MODES = ("single", "joint")
CONTROLS_TOGETHER = 16
"""Control directions that share a forward pass: three times as fast as one by one, more gains nothing."""


@dataclass(frozen=True)
class VariantReading:
    """One variant's readings by mode: column 0 of the masses is the unedited baseline, then the doses."""

    single: Reading
    joint: Reading
    controls: Float[np.ndarray, "row direction"]
    """Target mass under random directions at the primary dose, one onset at a time."""

    def base(self, mode: str) -> Float[np.ndarray, " row"]:
        """Unedited target mass."""
        return getattr(self, mode).mass[:, 0]

    def effect(self, mode: str) -> Float[np.ndarray, "row dose"]:
        """Change of target mass at each dose."""
        mass = getattr(self, mode).mass
        return mass[:, 1:] - mass[:, :1]

    def delivered(self, mode: str) -> Float[np.ndarray, "row dose"]:
        """How far each dose moved the stream."""
        return getattr(self, mode).delivered[:, 1:]


@dataclass(frozen=True)
class Bench:
    """All that a reading needs besides the variant."""

    pair: ModelPair
    layer: int
    """The dictionary's."""
    edit: FeatureEdit
    target: tuple[int, ...]
    onsets: dict[str, OnsetRows]
    """The onsets that each mode reads."""
    settings: InterveneSettings

    def read(self, variant: Variant) -> VariantReading:
        """The variant at every dose, in both modes, and its controls."""
        edits = [unedited, *(self.edit.of(variant, dose) for dose in self.settings.doses)]
        single, joint, controls = read(
            variant.model(self.pair).decoder,
            self.layer - variant.layers_below,
            [
                Request(self.onsets["single"], edits),
                Request(self.onsets["joint"], edits, joint=True),
                Request(self.onsets["single"], self._controls(variant), together=CONTROLS_TOGETHER),
            ],
            self.target,
        )
        for mode, reading in ("single", single), ("joint", joint):
            self._check(reading, f"{variant.name} ({mode})")
        return VariantReading(single, joint, controls.mass)

    def _check(self, reading: Reading, name: str) -> None:
        """Every dose but zero moved the stream, and dose zero changed nothing."""
        doses = self.settings.doses
        nonzero = [column for column, dose in enumerate(doses, 1) if dose]
        moved = Reading(reading.mass[:, nonzero], reading.delivered[:, nonzero])
        check_delivered(moved, [f"{name} at dose {doses[column - 1]}" for column in nonzero])
        for column in set(range(1, len(doses) + 1)) - set(nonzero):
            if not np.array_equal(reading.mass[:, column], reading.mass[:, 0]):
                raise SteerError(f"{name} at dose 0 differs from the baseline; the measurement cannot be trusted")

    def _controls(self, variant: Variant) -> list[Control]:
        """Random directions at the length of the variant's own edit of each row."""
        settings = self.settings
        primary = self.edit.of(variant, settings.primary_dose)
        directions = isotropic(settings.controls, len(self.edit.unit), generator(settings.seed, 31))
        return [Control(primary, direction) for direction in directions]

    def effects(self, reading: VariantReading, mode: str, gap: Float[np.ndarray, " row"]) -> dict:
        """The dose curve: points and share of the gap with intervals, the length delivered, and the coverage.

        Zero-ablation moves only the onsets at which the feature fires. Edited one at a time, the mean is the
        coverage times the mean where edited; edited jointly, the others are moved through attention.
        """
        onsets, effect, delivered = self.onsets[mode], reading.effect(mode), reading.delivered(mode)
        rows = estimates(effect, onsets, self.settings, gap)
        for column, (row, dose) in enumerate(zip(rows, self.settings.doses, strict=True)):
            moved = delivered[:, column] > 0
            row |= {
                "dose": dose,
                "mean_delivered_norm": float(delivered[:, column].mean()),
                "rows_edited": int(moved.sum()),
                "coverage": float(moved.mean()),
                **self._where_edited(effect[moved, column], onsets.task[moved]),
            }
        return {"n": len(onsets), "tasks": len(np.unique(onsets.task)), "doses": rows}

    def _where_edited(self, effect: Float[np.ndarray, " moved"], task: np.ndarray) -> dict:
        """The mean over the rows that an edit moved, with its interval where there are tasks enough for one."""
        keys, tasks = ("mean_where_edited", "where_edited_low", "where_edited_high"), len(np.unique(task))
        if tasks < self.settings.min_tasks:
            means = (float(effect.mean()) if len(effect) else None, None, None)
        else:
            draws = {"draws": self.settings.bootstrap_draws, "seed": self.settings.seed}
            found = stats.cluster_bootstrap(effect[:, None], task, **draws)
            means = (float(found.mean[0]), float(found.low[0]), float(found.high[0]))
        return {**dict(zip(keys, means, strict=True)), "tasks_edited": tasks}

    def controls(self, reading: VariantReading) -> dict:
        """Mean effects of the random directions, and the feature's rank among them by distance from zero."""
        means = (reading.controls - reading.single.mass[:, :1]).mean(axis=0)
        observed = reading.effect("single")[:, self.settings.doses.index(self.settings.primary_dose)].mean()
        low, high = np.quantile(means, [0.025, 0.975])
        return {
            "family": "isotropic",
            "count": len(means),
            "low": float(low),
            "high": float(high),
            "rank_p": stats.rank_p(float(observed), means),
            "means": means.tolist(),
        }

    def trials(self, variants: Sequence[Variant], readings: Sequence[VariantReading]) -> dict[str, np.ndarray]:
        """One row an onset x variant x dose x mode."""
        parts: list[dict[str, np.ndarray]] = []
        for variant, found in zip(variants, readings, strict=True):
            for mode, onsets in self.onsets.items():
                reading, n = getattr(found, mode), len(onsets)
                parts += [
                    {
                        "variant": np.full(n, variant.name),
                        "mode": np.full(n, mode),
                        "dose": np.full(n, dose),
                        "prompt": onsets.prompt,
                        "task": onsets.task,
                        "position": onsets.position,
                        "next_is_target": onsets.is_target,
                        "p_base": reading.mass[:, 0],
                        "p_edited": reading.mass[:, column],
                        "delivered_norm": reading.delivered[:, column],
                    }
                    for column, dose in enumerate(self.settings.doses, 1)
                ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def choose_onsets(texts: Sequence[Text], settings: InterveneSettings) -> dict[str, OnsetRows]:
    """Up to `onsets_per_prompt` of each text for single edits, drawn by seed; all of them for joint ones."""
    random = np.random.default_rng([settings.seed, 5])
    every = [np.flatnonzero(text.is_onset) for text in texts]
    some = [np.sort(random.permutation(found)[: settings.onsets_per_prompt]) for found in every]
    return {"single": OnsetRows.of(texts, some), "joint": OnsetRows.of(texts, every)}


def estimates(
    effect: Float[np.ndarray, "row column"],
    onsets: OnsetRows,
    settings: InterveneSettings,
    gap: Float[np.ndarray, " row"] | None = None,
) -> list[dict]:
    """Per column: the onset-weighted mean with its interval, the prompt-weighted mean, the share of the gap.

    The share is None where the two models do not differ at all, and an end of its interval where it has none.
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
        shares = np.stack([share.mean, share.low, share.high])
    for row, ends in zip(rows, shares.T, strict=True):
        row |= {key: _finite(value) for key, value in zip(("share", "share_low", "share_high"), ends, strict=True)}
    return rows


def _finite(value: float) -> float | None:
    """None for what is unbounded or unknown: JSON has no infinity."""
    return float(value) if np.isfinite(value) else None
