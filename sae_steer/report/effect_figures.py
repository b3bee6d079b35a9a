"""A studied feature's charts, each a function of its record: effects, dose curves, control directions."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_steer.edits.arms import RAW, TRANSPORTED
from sae_steer.edits.controls import color_of_family
from sae_steer.effects.estimates import ControlFamily, Effect, RibbonEnds
from sae_steer.report.drawing import ABOVE, BAND, JOINT, SINGLE, TARGET, figure_of, styled
from sae_steer.report.numbers import count, p_value, points_interval
from sae_steer.study.record import Evidence, Study, VariantResult

MODES = {"single": ("one onset at a time", SINGLE, "o"), "joint": ("all onsets of a text", JOINT, "D")}
ARROW = {1: "\u2192", -1: "\u2190"}
POINTS = "change of P(target tokens), in points"

FLAVOURS = (RAW, TRANSPORTED)
POSITIVE = {
    "mean difference": "^",
    "unembedding": "v",
    "full patch, raw": "P",
    "full patch, transported": "X",
    "full patch, rotated": "*",
}
OTHER_MARKERS = "hspd"
"""Of positive controls that have none of their own above."""


@styled
def effect_forest(study: Study) -> Figure:
    """The variants' effects beside the bound, control directions and positive controls, and the sampled measure."""
    evidence, variants, gap = study.measured, study.variants, study.measured.gap
    bound = 100 * evidence.bound.value
    figure = figure_of(
        1.9 + 0.85 * len(variants),
        f"{study.title}: {study.verdict} (effects at dose {evidence.primary_dose:g})",
        f"Bars: 95 % intervals over tasks; {_sizes(evidence)}.\nGap between the models at the same onsets: "
        f"{points_interval(gap.single)} points (single), {points_interval(gap.joint)} (joint).\n"
        f"Shaded: inside the bound of {bound:.2f} points.",
    )
    if all(variant.sampled for variant in variants):
        exact, sampled = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _sampled_panel(sampled, variants)
    else:
        exact = figure.subplots()
    exact.axvspan(-bound, bound, color=BAND, alpha=0.35, linewidth=0, zorder=-1)
    for row, variant in enumerate(variants):
        _controls(exact, row - 0.2, variant.controls, _first(row, "control directions, each alone (95 %)"))
        for (mode, (name, color, marker)), shift in zip(MODES.items(), (-0.2, 0.2), strict=True):
            mean, low, high = _in_points(evidence.primary(variant, mode))
            exact.hlines(row + shift, low, high, color=color, linewidth=1.8, zorder=3)
            exact.plot(mean, row + shift, marker, color=color, markersize=6, label=_first(row, name), zorder=4)
        for name, marker in _positives(variants).items():
            effect = variant.single.beside.get(name)
            if effect:
                label = _first(row, f"{name} (positive control)")
                exact.plot(100 * effect.mean, row, marker, color=TARGET, markersize=5, label=label, zorder=3)
    exact.axvline(0, color=SINGLE, linewidth=0.8, zorder=1)
    exact.set(ylim=(len(variants) - 0.45, -0.55), xlabel=POINTS)
    labels = [f"{_place(v)}\npredicted {ARROW[v.predicted_sign]}, {v.verdict}" for v in variants]
    exact.set_yticks(range(len(variants)), labels)
    exact.tick_params("y", length=0)
    exact.legend(**ABOVE)
    return figure


def _positives(variants: Sequence[VariantResult]) -> dict[str, str]:
    """{what should move the measure: its marker}, of all that stand beside the edits; not their other flavours."""
    names = dict.fromkeys(name for variant in variants for name in variant.single.beside if name not in FLAVOURS)
    others = cycle(OTHER_MARKERS)
    return {name: POSITIVE.get(name) or next(others) for name in names}


def _in_points(effect: Effect) -> tuple[float, float, float]:
    """Mean and interval."""
    return 100 * effect.mean, 100 * effect.low, 100 * effect.high


def _controls(axes: Axes, height: float, controls: Sequence[ControlFamily], label: str | None) -> None:
    """The band that holds 95 % of the family that reaches furthest, on either side."""
    low, high = min(family.low for family in controls), max(family.high for family in controls)
    _band(axes, height, low, high, label)


def _sampled_panel(axes: Axes, variants: Sequence[VariantResult]) -> None:
    for row, variant in enumerate(variants):
        assert variant.sampled is not None
        strict = variant.sampled.strict
        _band(axes, row, strict.null_low, strict.null_high, _first(row, "unedited against unedited (95 %)"))
        if strict.delta is None or strict.p is None:  # it wrote no step
            continue
        label = _first(row, f"{count(variant.sampled.texts)} sampled plans, strict matcher")
        axes.plot(100 * strict.delta, row, "s", color=TARGET, markersize=6, label=label, zorder=4)
        axes.annotate(
            f"p {p_value(strict.p)}",
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.axvline(0, color=SINGLE, linewidth=0.8, zorder=1)
    axes.set(xlabel="change of sampled target steps, in points")
    axes.legend(**ABOVE)
    axes.tick_params("y", length=0)


def _band(axes: Axes, height: float | int, low: float, high: float, label: str | None) -> None:
    axes.use_sticky_edges = False  # a band may end inside the axes
    axes.barh(height, 100 * (high - low), left=100 * low, height=0.36, color=BAND, label=label, zorder=0)


def _first(row: int, label: str) -> str | None:
    """The label of the first of several alike, so that the legend says it once."""
    return label if row == 0 else None


@styled
def dose_curves(study: Study) -> Figure:
    """Each variant's effect over the doses, with the ribbon of control directions."""
    variants, primary = study.variants, study.measured.primary_dose
    joint = variants[0].joint_doses
    figure = figure_of(
        0.9 + 2.3 * ((len(variants) + 1) // 2),
        f"{study.title}: effect by dose",
        f"Shaded: 95 % intervals over tasks; {count(variants[0].single.n)} onsets edited one at a time, "
        f"{count(joint.n)} of {count(joint.tasks)} tasks jointly.\nEvery panel has its own scale. Grey: control "
        f"directions, each alone (95 % at dose {primary:g}, the range of a few at the others).",
    )
    for axes, variant in _panels(figure, variants):
        _ribbon(axes, variant.controls, primary)
        for mode, curve in variant.curves:
            name, color, marker = MODES[mode]
            dose = [effect.dose for effect in curve.doses]
            mean, low, high = zip(*map(_in_points, curve.doses), strict=True)
            axes.fill_between(dose, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(dose, mean, color=color, marker=marker, markersize=4, linewidth=1.4, label=name)
        axes.axhline(0, color=SINGLE, linewidth=0.8, zorder=1)
        axes.set_xticks([value for value in dose if value == int(value)])
        axes.set_title(f"{_place(variant)}, predicted {'up' if variant.predicted_sign > 0 else 'down'}")
    figure.axes[0].legend()
    figure.supylabel(POINTS, fontsize=9.5)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("dose, in multiples of s")
    return figure


def _ribbon(axes: Axes, controls: Sequence[ControlFamily], primary: float) -> None:
    ends: dict[float, tuple[float, float]] = {0.0: (0.0, 0.0)}
    for family in controls:
        for reach in [*family.ribbon, RibbonEnds(primary, family.low, family.high, family.count)]:
            low, high = ends.get(reach.dose, (reach.low, reach.high))
            ends[reach.dose] = min(low, reach.low), max(high, reach.high)
    doses = sorted(ends)
    axes.fill_between(
        doses, [100 * ends[d][0] for d in doses], [100 * ends[d][1] for d in doses], color=BAND, linewidth=0, zorder=0
    )


@styled
def control_histograms(study: Study) -> Figure:
    """Where the edit stands among control directions of the same delivered length, per variant and family."""
    evidence, variants = study.measured, study.variants
    single = variants[0].single
    figure = figure_of(
        1.1 + 2.1 * ((len(variants) + 1) // 2),
        f"{study.title} among control directions",
        f"Directions moved as far as the edit at dose {evidence.primary_dose:g}; means over n = {count(single.n)} "
        f"onsets\nof {count(single.tasks)} tasks, one at a time. "
        "Orange line: the edit; p: the worst of its ranks by distance from zero, family by family.",
    )
    for axes, variant in _panels(figure, variants):
        means = [[100 * mean for mean in family.means] for family in variant.controls]
        low, high = min(map(min, means)), max(map(max, means))
        room = 0 if high > low else 1e-6
        labels = [f"{family.family} ({family.count})" for family in variant.controls]
        colors = [color_of_family(family.family) for family in variant.controls]
        axes.hist(means, bins=20, range=(low - room, high + room), color=colors, label=labels, stacked=True)
        axes.axvline(100 * evidence.primary(variant, "single").mean, color=TARGET, linewidth=2)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        worst = variant.single.tests.specific_p
        axes.set_title(f"{_place(variant)}" + ("" if worst is None else f": p {p_value(worst)}"))
    figure.axes[0].legend()
    figure.supylabel("directions", fontsize=9.5)
    for axes in figure.axes[-2:]:
        axes.set_xlabel(POINTS)
    return figure


@styled
def task_effects(study: Study) -> Figure:
    """The mean effect in every task, in rising order, with the bound."""
    variants, bound = study.variants, 100 * study.measured.bound.value
    figure = figure_of(
        0.9 + 2.1 * ((len(variants) + 1) // 2),
        f"{study.title}: effect by task",
        f"One point a task, {count(variants[0].single.tasks)} of them, each onset edited alone; shaded: inside "
        "the bound. Shown, not tested.",
    )
    for axes, variant in _panels(figure, variants):
        axes.axhspan(-bound, bound, color=BAND, alpha=0.35, linewidth=0, zorder=-1)
        axes.plot([100 * task.mean for task in variant.by_task], ".", color=SINGLE, markersize=3)
        axes.axhline(0, color=SINGLE, linewidth=0.8, zorder=1)
        axes.set_title(_place(variant))
    figure.supylabel(POINTS, fontsize=9.5)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("tasks")
    return figure


def _panels(figure: Figure, variants: Sequence[VariantResult]) -> list[tuple[Axes, VariantResult]]:
    """Two panels a row, one a variant."""
    grid = np.ravel(figure.subplots((len(variants) + 1) // 2, 2, squeeze=False))
    for axes in grid[len(variants) :]:
        axes.remove()
    return list(zip(grid, variants, strict=False))


def _place(variant: VariantResult) -> str:
    return f"{variant.name} in {variant.model}"


def _sizes(evidence: Evidence) -> str:
    """n and clusters of both modes."""
    single, joint = evidence.variants[0].single, evidence.variants[0].joint
    return (
        f"n = {count(single.n)} onsets of {count(single.tasks)} tasks (single), "
        f"{count(joint.n)} of {count(joint.tasks)} (joint)"
    )


def describe(study: Study) -> str:
    """The forest in words, for those who cannot see it."""
    evidence, parts = study.measured, []
    for variant in evidence.variants:
        single, joint = (points_interval(evidence.primary(variant, mode)) for mode in ("single", "joint"))
        parts.append(f"{variant.name}: {single} points one onset at a time, {joint} at all onsets of a text")
    return f"{study.title} at dose {evidence.primary_dose:g}. {'; '.join(parts)}."
