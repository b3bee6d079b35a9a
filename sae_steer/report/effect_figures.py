"""A studied feature's charts, each a function of its record: effects, dose curves, control directions."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_steer.report.drawing import ABOVE, BAND, FAINT, JOINT, SINGLE, TARGET, figure_of, styled
from sae_steer.report.numbers import count, p_value, points_interval
from sae_steer.report.run import Record, StudyRecord

MODES = {"single": ("one onset at a time", SINGLE, "o"), "joint": ("all onsets of a text", JOINT, "D")}
ARROW = {1: "\u2192", -1: "\u2190"}
POINTS = "change of P(target tokens), in points"


@styled
def effect_forest(study: StudyRecord) -> Figure:
    """The variants' effects at the primary dose against random directions, and the sampled measure beside them."""
    record, variants, gap = study.record, study.record["variants"], study.record["gap"]
    figure = figure_of(
        1.6 + 0.75 * len(variants),
        f"{_name(study)}: effects at dose {record['primary_dose']:g}",
        f"Bars: 95 % intervals over tasks; {_sizes(study)}.\nGap between the models at the same onsets: "
        f"{points_interval(gap['single'])} points (single), {points_interval(gap['joint'])} (joint).",
    )
    if all(variant["sampled"] for variant in variants):
        exact, sampled = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _sampled_panel(sampled, variants)
    else:
        exact = figure.subplots()
    for row, variant in enumerate(variants):
        controls = variant["controls"]
        band = _first(row, "random directions, one onset at a time (95 %)")
        _band(exact, row - 0.2, controls["low"], controls["high"], band)
        for (mode, (name, color, marker)), shift in zip(MODES.items(), (-0.2, 0.2), strict=True):
            mean, low, high = (100 * study.primary(variant, mode)[key] for key in ("mean", "low", "high"))
            exact.hlines(row + shift, low, high, color=color, linewidth=1.8, zorder=3)
            exact.plot(mean, row + shift, marker, color=color, markersize=6, label=_first(row, name), zorder=4)
    exact.axvline(0, color=SINGLE, linewidth=0.8, zorder=1)
    exact.set(ylim=(len(variants) - 0.45, -0.55), xlabel=POINTS)
    labels = [f"{_place(variant)}\npredicted {ARROW[variant['predicted_sign']]}" for variant in variants]
    exact.set_yticks(range(len(variants)), labels)
    exact.tick_params("y", length=0)
    exact.legend(**ABOVE)
    return figure


def _sampled_panel(axes: Axes, variants: Sequence[Record]) -> None:
    for row, variant in enumerate(variants):
        found, plans = variant["sampled"]["strict"], count(variant["sampled"]["texts"])
        _band(axes, row, found["null_low"], found["null_high"], _first(row, "unedited against unedited (95 %)"))
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
    """Each variant's effect over the doses, with the band of random directions at the primary dose."""
    variants, primary = study.record["variants"], study.record["primary_dose"]
    figure = figure_of(
        0.9 + 2.3 * ((len(variants) + 1) // 2),
        f"{_name(study)}: effect by dose",
        f"Shaded: 95 % intervals over tasks; {_sizes(study)}.\nEvery panel has its own scale. "
        f"Grey bar: 95 % of random directions at dose {primary:g}, one onset at a time.",
    )
    for axes, variant in _panels(figure, variants):
        low, high = (100 * variant["controls"][end] for end in ("low", "high"))
        axes.use_sticky_edges = False
        axes.bar(primary, high - low, bottom=low, width=0.24, color=BAND, zorder=0)
        for mode, (name, color, marker) in MODES.items():
            rows = variant[mode]["doses"]
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


@styled
def control_histograms(study: StudyRecord) -> Figure:
    """Where the feature stands among random directions of the same delivered length, per variant."""
    variants, primary = study.record["variants"], study.record["primary_dose"]
    controls, single = variants[0]["controls"], variants[0]["single"]
    figure = figure_of(
        0.9 + 2.1 * ((len(variants) + 1) // 2),
        f"{_name(study)} among random directions",
        f"{count(controls['count'])} {controls['family']} directions a variant, moved as far as the feature's edit "
        f"at dose {primary:g}; means over n = {count(single['n'])} onsets\n"
        f"of {count(single['tasks'])} tasks, one at a time. "
        "Shaded: 95 % of them.\nOrange line: the feature; p: its rank by distance from zero.",
    )
    for axes, variant in _panels(figure, variants):
        controls = variant["controls"]
        means = [100 * mean for mean in controls["means"]]
        room = 0 if max(means) > min(means) else 1e-6
        axes.hist(means, bins=20, range=(min(means) - room, max(means) + room), color=FAINT)
        axes.axvspan(100 * controls["low"], 100 * controls["high"], color=BAND, alpha=0.5, linewidth=0, zorder=0)
        axes.axvline(100 * study.primary(variant, "single")["mean"], color=TARGET, linewidth=2)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_title(f"{_place(variant)}: p {p_value(controls['rank_p'])}")
    figure.supylabel("directions", fontsize=9.5)
    for axes in figure.axes[-2:]:
        axes.set_xlabel(POINTS)
    return figure


def _panels(figure: Figure, variants: Sequence[Record]) -> list[tuple[Axes, Record]]:
    """Two panels a row, one a variant."""
    grid = np.ravel(figure.subplots((len(variants) + 1) // 2, 2, squeeze=False))
    for axes in grid[len(variants) :]:
        axes.remove()
    return list(zip(grid, variants, strict=False))


def _name(study: StudyRecord) -> str:
    return f"Feature {study.record['feature']} of {study.record['dictionary']}"


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
    return f"{_name(study)} at dose {study.record['primary_dose']:g}. {'; '.join(parts)}."
