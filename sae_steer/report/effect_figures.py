"""A studied feature's charts, each a function of its record: effects, dose curves, control directions."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_steer.report.drawing import ABOVE, BAND, JOINT, SINGLE, TARGET, figure_of, styled
from sae_steer.report.numbers import count, p_value, points_interval
from sae_steer.report.run import Record, StudyRecord

MODES = {"single": ("one onset at a time", SINGLE, "o"), "joint": ("all onsets of a text", JOINT, "D")}
ARROW = {1: "\u2192", -1: "\u2190"}
POINTS = "change of P(target tokens), in points"


FAMILIES = ("#9a9a9a", "#6fa8c9", "#c9a86f")
POSITIVE = {"mean difference": "^", "unembedding": "v", "full patch, raw": "P", "full patch, transported": "X"}


@styled
def effect_forest(study: StudyRecord) -> Figure:
    """The variants' effects beside the bound, control directions and positive controls, and the sampled measure."""
    record, variants, gap = study.record, study.record["variants"], study.record["gap"]
    bound = 100 * record["bound"]["value"]
    figure = figure_of(
        1.9 + 0.85 * len(variants),
        f"{study.title}: {record['verdict']} (effects at dose {record['primary_dose']:g})",
        f"Bars: 95 % intervals over tasks; {_sizes(study)}.\nGap between the models at the same onsets: "
        f"{points_interval(gap['single'])} points (single), {points_interval(gap['joint'])} (joint).\n"
        f"Shaded: inside the bound of {bound:.2f} points.",
    )
    if all(variant["sampled"] for variant in variants):
        exact, sampled = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _sampled_panel(sampled, variants)
    else:
        exact = figure.subplots()
    exact.axvspan(-bound, bound, color=BAND, alpha=0.35, linewidth=0, zorder=-1)
    for row, variant in enumerate(variants):
        _controls(exact, row - 0.2, variant["controls"], _first(row, "control directions, each alone (95 %)"))
        for (mode, (name, color, marker)), shift in zip(MODES.items(), (-0.2, 0.2), strict=True):
            mean, low, high = (100 * study.primary(variant, mode)[key] for key in ("mean", "low", "high"))
            exact.hlines(row + shift, low, high, color=color, linewidth=1.8, zorder=3)
            exact.plot(mean, row + shift, marker, color=color, markersize=6, label=_first(row, name), zorder=4)
        for name, sign in POSITIVE.items():
            beside = variant["single"]["beside"].get(name)
            if beside:
                label = _first(row, f"{name} (positive control)")
                exact.plot(100 * beside["mean"], row, sign, color=TARGET, markersize=5, label=label, zorder=3)
    exact.axvline(0, color=SINGLE, linewidth=0.8, zorder=1)
    exact.set(ylim=(len(variants) - 0.45, -0.55), xlabel=POINTS)
    labels = [f"{_place(v)}\npredicted {ARROW[v['predicted_sign']]}, {v['verdict']}" for v in variants]
    exact.set_yticks(range(len(variants)), labels)
    exact.tick_params("y", length=0)
    exact.legend(**ABOVE)
    return figure


def _controls(axes: Axes, height: float, controls: Sequence[Record], label: str | None) -> None:
    """The band that holds 95 % of the family that reaches furthest, on either side."""
    low, high = min(family["low"] for family in controls), max(family["high"] for family in controls)
    _band(axes, height, low, high, label)


def _sampled_panel(axes: Axes, variants: Sequence[Record]) -> None:
    for row, variant in enumerate(variants):
        found, plans = variant["sampled"]["strict"], count(variant["sampled"]["texts"])
        _band(axes, row, found["null_low"], found["null_high"], _first(row, "unedited against unedited (95 %)"))
        if found["delta"] is None:
            continue
        label = _first(row, f"{plans} sampled plans, strict matcher")
        axes.plot(100 * found["delta"], row, "s", color=TARGET, markersize=6, label=label, zorder=4)
        axes.annotate(
            f"p {p_value(found['p'])}",
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
def dose_curves(study: StudyRecord) -> Figure:
    """Each variant's effect over the doses, with the ribbon of control directions."""
    record, variants = study.record, study.record["variants"]
    joint = variants[0]["joint_doses"]
    figure = figure_of(
        0.9 + 2.3 * ((len(variants) + 1) // 2),
        f"{study.title}: effect by dose",
        f"Shaded: 95 % intervals over tasks; {count(variants[0]['single']['n'])} onsets edited one at a time, "
        f"{count(joint['n'])} of {count(joint['tasks'])} tasks jointly.\nEvery panel has its own scale. Grey: control "
        f"directions, each alone (95 % at dose {record['primary_dose']:g}, the range of a few at the others).",
    )
    for axes, variant in _panels(figure, variants):
        _ribbon(axes, variant["controls"], record["primary_dose"])
        for mode, place in ("single", "single"), ("joint", "joint_doses"):
            name, color, marker = MODES[mode]
            rows = variant[place]["doses"]
            dose = [row["dose"] for row in rows]
            mean, low, high = ([100 * row[key] for row in rows] for key in ("mean", "low", "high"))
            axes.fill_between(dose, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(dose, mean, color=color, marker=marker, markersize=4, linewidth=1.4, label=name)
        axes.axhline(0, color=SINGLE, linewidth=0.8, zorder=1)
        axes.set_xticks([value for value in dose if value == int(value)])
        axes.set_title(f"{_place(variant)}, predicted {'up' if variant['predicted_sign'] > 0 else 'down'}")
    figure.axes[0].legend()
    figure.supylabel(POINTS, fontsize=9.5)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("dose, in multiples of s")
    return figure


def _ribbon(axes: Axes, controls: Sequence[Record], primary: float) -> None:
    ends: dict[float, tuple[float, float]] = {0.0: (0.0, 0.0)}
    for family in controls:
        for row in [*family["ribbon"], {"dose": primary, **{end: family[end] for end in ("low", "high")}}]:
            low, high = ends.get(row["dose"], (row["low"], row["high"]))
            ends[row["dose"]] = min(low, row["low"]), max(high, row["high"])
    doses = sorted(ends)
    axes.fill_between(
        doses, [100 * ends[d][0] for d in doses], [100 * ends[d][1] for d in doses], color=BAND, linewidth=0, zorder=0
    )


@styled
def control_histograms(study: StudyRecord) -> Figure:
    """Where the edit stands among control directions of the same delivered length, per variant and family."""
    variants, primary = study.record["variants"], study.record["primary_dose"]
    single = variants[0]["single"]
    figure = figure_of(
        1.1 + 2.1 * ((len(variants) + 1) // 2),
        f"{study.title} among control directions",
        f"Directions moved as far as the edit at dose {primary:g}; means over n = {count(single['n'])} onsets\n"
        f"of {count(single['tasks'])} tasks, one at a time. "
        "Orange line: the edit; p: the worst of its ranks by distance from zero, family by family.",
    )
    for axes, variant in _panels(figure, variants):
        means = [[100 * mean for mean in family["means"]] for family in variant["controls"]]
        low, high = min(map(min, means)), max(map(max, means))
        room = 0 if high > low else 1e-6
        labels = [f"{family['family']} ({family['count']})" for family in variant["controls"]]
        colors = FAMILIES[: len(means)]
        axes.hist(means, bins=20, range=(low - room, high + room), color=colors, label=labels, stacked=True)
        axes.axvline(100 * study.primary(variant, "single")["mean"], color=TARGET, linewidth=2)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        worst = variant["single"]["tests"]["specific_p"]
        axes.set_title(f"{_place(variant)}" + ("" if worst is None else f": p {p_value(worst)}"))
    figure.axes[0].legend()
    figure.supylabel("directions", fontsize=9.5)
    for axes in figure.axes[-2:]:
        axes.set_xlabel(POINTS)
    return figure


@styled
def task_effects(study: StudyRecord) -> Figure:
    """The mean effect in every task, in rising order, with the bound."""
    variants, bound = study.record["variants"], 100 * study.record["bound"]["value"]
    figure = figure_of(
        0.9 + 2.1 * ((len(variants) + 1) // 2),
        f"{study.title}: effect by task",
        f"One point a task, {count(variants[0]['single']['tasks'])} of them, each onset edited alone; shaded: inside "
        "the bound. Shown, not tested.",
    )
    for axes, variant in _panels(figure, variants):
        axes.axhspan(-bound, bound, color=BAND, alpha=0.35, linewidth=0, zorder=-1)
        axes.plot([100 * row["mean"] for row in variant["by_task"]], ".", color=SINGLE, markersize=3)
        axes.axhline(0, color=SINGLE, linewidth=0.8, zorder=1)
        axes.set_title(_place(variant))
    figure.supylabel(POINTS, fontsize=9.5)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("tasks")
    return figure


def _panels(figure: Figure, variants: Sequence[Record]) -> list[tuple[Axes, Record]]:
    """Two panels a row, one a variant."""
    grid = np.ravel(figure.subplots((len(variants) + 1) // 2, 2, squeeze=False))
    for axes in grid[len(variants) :]:
        axes.remove()
    return list(zip(grid, variants, strict=False))


def _place(variant: Record) -> str:
    return f"{variant['variant']} in {variant['model']}"


def _sizes(study: StudyRecord) -> str:
    """n and clusters of both modes."""
    single, joint = (study.record["variants"][0][mode] for mode in MODES)
    return (
        f"n = {count(single['n'])} onsets of {count(single['tasks'])} tasks (single), "
        f"{count(joint['n'])} of {count(joint['tasks'])} (joint)"
    )


def describe(study: StudyRecord) -> str:
    """The forest in words, for those who cannot see it."""
    parts = []
    for variant in study.record["variants"]:
        single, joint = (points_interval(study.primary(variant, mode)) for mode in MODES)
        parts.append(f"{variant['variant']}: {single} points one onset at a time, {joint} at all onsets of a text")
    return f"{study.title} at dose {study.record['primary_dose']:g}. {'; '.join(parts)}."
