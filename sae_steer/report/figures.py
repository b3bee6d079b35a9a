"""The report's charts: records in, matplotlib figures out; no files and no state shared between them."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator

from sae_steer.report.drawing import (
    BAND,
    FAINT,
    JOINT,
    REFERENCE,
    RELEASED,
    SINGLE,
    TARGET,
    figure_of,
    in_percent,
    spread,
    styled,
)
from sae_steer.report.numbers import count, number, p_value, percent, points_interval
from sae_steer.report.run import Record, StudyRecord

RELEASED_RATES = {"target": 5181 / 8770, "reference": 3 / 8770}
"""Feature 2504 of the released adhd_L2 dictionary, at onsets of adhd text (three_probes.json)."""
MODES = {"single": ("one onset at a time", SINGLE, "o"), "joint": ("all onsets of a text", JOINT, "D")}
ARROW = {1: "\u2192", -1: "\u2190"}
POINTS = "change of P(target tokens), in points"


@styled
def firing_scatter(scan: Record, table: Mapping[str, np.ndarray], studied: Sequence[int]) -> Figure:
    """Every feature's firing rate at step onsets in the two models, on log axes; zeros stand at the axis."""
    target, reference = scan["target"], scan["reference"]
    figure = figure_of(
        6.3,
        f"How often each feature fires in {target} and in {reference}",
        f"{count(scan['alive'])} of {count(scan['d_sae'])} features of {scan['dictionary']} that fire at all; the same "
        f"n = {count(scan['onsets'])} step onsets of {count(scan['tasks'])} tasks read in both models.\n"
        "Bars: 95 % Wilson intervals at the design effect of the tasks.",
    )
    axes, floor = figure.add_subplot(), min(0.4 / scan["onsets"], 1e-4)
    rate = {model: np.maximum(table[f"{model}_rate"], floor) for model in ("target", "reference")}
    specific, alive = table["specific"].astype(bool), table["alive"].astype(bool)
    for shown, color, size, label in (
        (alive & ~specific, FAINT, 9, "other features"),
        (specific, TARGET, 13, f"specific to {target} ({count(scan['primary_count'])})"),
    ):
        cloud = {"s": size, "color": color, "linewidths": 0, "alpha": 0.6, "rasterized": True, "label": label}
        axes.scatter(rate["reference"][shown], rate["target"][shown], **cloud)
    axes.plot(
        RELEASED_RATES["reference"], RELEASED_RATES["target"], "*", color=RELEASED, markersize=13, markeredgecolor="white",
        label="released feature 2504, another dictionary:\n5181 and 3 of 8770 onsets", zorder=4,
    )  # fmt: skip
    _criteria(axes, scan["criteria"], floor)
    _rate_axes(axes, floor)
    _labelled(axes, table, _names(scan, studied), floor)
    axes.set_xlabel(f"fires at this share of onsets in {reference}")
    axes.set_ylabel(f"fires at this share of onsets in {target}")
    figure.legend(loc="outside right upper")
    return figure


def _criteria(axes: Axes, criteria: Record, floor: float) -> None:
    line = {"color": FAINT, "linewidth": 0.9, "zorder": 1}
    axes.plot([floor, 1], [floor, 1], **line, label="equal rates")
    axes.plot([floor, 1 / criteria["min_ratio"]], [criteria["min_ratio"] * floor, 1], **line, linestyle="--", label=f"ratio {criteria['min_ratio']:g}")
    axes.axhline(criteria["min_rate"], **line, linestyle=":", label=f"least rate {percent(criteria['min_rate'])}")


def _rate_axes(axes: Axes, floor: float) -> None:
    ticks = [floor, *(tick for tick in (1e-4, 1e-3, 1e-2, 0.1, 1.0) if tick > 2 * floor)]
    labels = ["0", *(f"{100 * tick:g} %" for tick in ticks[1:])]
    axes.set(xscale="log", yscale="log", xlim=(0.7 * floor, 1.4), ylim=(0.7 * floor, 1.4))
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(FixedLocator([]))
        axis.set_ticklabels(labels)


def _names(scan: Record, studied: Sequence[int]) -> dict[int, str]:
    """Why a feature is labelled."""
    reasons: dict[int, list[str]] = {}
    if scan["top"]:
        reasons.setdefault(scan["top"][0]["feature"], []).append("top")
    reasons.setdefault(scan["like_2504"]["feature"], []).append("like-2504")
    for feature in studied:
        reasons.setdefault(feature, []).append("intervened on")
    return {feature: f"{feature}: {', '.join(why)}" for feature, why in reasons.items()}


def _labelled(axes: Axes, table: Mapping[str, np.ndarray], names: Mapping[int, str], floor: float) -> None:
    """Points with interval bars and names; names that would overlap are moved up."""
    at = {int(feature): row for row, feature in enumerate(table["feature"])}
    rows = [at[feature] for feature in names]
    heights = spread([float(np.log10(max(table["target_rate"][row], floor))) for row in rows], 0.17)
    for name, row, height in zip(names.values(), rows, heights, strict=True):
        ends = {}
        for model in ("reference", "target"):
            low, mid, high = (max(float(table[f"{model}_rate{part}"][row]), floor) for part in ("_low", "", "_high"))
            ends[model] = mid, [[max(mid - low, 0)], [max(high - mid, 0)]]
        (x, xerr), (y, yerr) = ends["reference"], ends["target"]
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="o", color=SINGLE, markersize=5, capsize=2, linewidth=1.1, zorder=5)
        axes.annotate(
            name, (x, y), xytext=(max(2.2 * x, 6 * floor), 10**height), va="center", fontsize=8.5, zorder=6,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": SINGLE, "shrinkB": 3},
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


@styled
def effect_forest(study: StudyRecord) -> Figure:
    """The variants' effects at the primary dose against random directions, and the sampled measure beside them."""
    record, variants = study.record, study.record["variants"]
    sampled = all(variant["sampled"] for variant in variants)
    gap = record["gap"]
    figure = figure_of(
        1.35 + 0.85 * len(variants),
        f"Feature {record['feature']} of {record['dictionary']}: effects at dose {record['primary_dose']:g}",
        f"Bars: 95 % intervals over tasks; {_sizes(study)}.\nGap between the models at the same onsets: "
        f"{points_interval(gap['single'])} points (single), {points_interval(gap['joint'])} (joint).",
    )
    if sampled:
        exact, drawn = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _sampled_panel(drawn, variants)
    else:
        exact = figure.subplots()
    for row, variant in enumerate(variants):
        controls = variant["controls"]
        _band(exact, row - 0.2, controls["low"], controls["high"], "random directions, edited singly (95 %)" if row == 0 else None)
        for mode, shift in (("single", -0.2), ("joint", 0.2)):
            _bar(exact, study.primary(variant, mode), row + shift, mode, labelled=row == 0)
        _gap_line(exact, variant["predicted_sign"] * 100 * gap["single"]["mean"], row)
    exact.axvline(0, color=SINGLE, linewidth=0.8, zorder=1)
    exact.set(ylim=(len(variants) - 0.45, -0.55), xlabel=POINTS, title="exact probability at step onsets")
    labels = [f"{v['variant']} in {v['model']}\npredicted {ARROW[v['predicted_sign']]}" for v in variants]
    exact.set_yticks(range(len(variants)), labels)
    exact.tick_params("y", length=0)
    figure.legend(loc="outside lower right", ncols=3)
    return figure


def _bar(axes: Axes, row: Record, height: float, mode: str, *, labelled: bool) -> None:
    name, color, marker = MODES[mode]
    mean, low, high = (100 * row[key] for key in ("mean", "low", "high"))
    axes.hlines(height, low, high, color=color, linewidth=1.8, zorder=3)
    axes.plot(mean, height, marker, color=color, markersize=6, linestyle="none", label=name if labelled else None, zorder=4)


def _band(axes: Axes, height: float, low: float, high: float, label: str | None) -> None:
    axes.barh(height, 100 * (high - low), left=100 * low, height=0.36, color=BAND, label=label, zorder=0)


def _gap_line(axes: Axes, gap: float, row: int) -> None:
    """The gap, drawn where it does not dwarf the effects."""
    low, high = axes.get_xlim()
    if low <= gap <= high:
        axes.vlines(gap, row - 0.4, row + 0.4, color=REFERENCE, linestyle=":", linewidth=1.4)


def _sampled_panel(axes: Axes, variants: Sequence[Record]) -> None:
    for row, variant in enumerate(variants):
        found = variant["sampled"]["strict"]
        _band(axes, row, found["null_low"], found["null_high"], None)
        axes.plot(100 * found["delta"], row, "s", color=TARGET, markersize=6, zorder=4)
        axes.annotate(f"p {p_value(found['p'])}", (1, row), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
    texts = count(variants[0]["sampled"]["texts"])
    axes.axvline(0, color=SINGLE, linewidth=0.8, zorder=1)
    axes.set(title=f"{texts} sampled plans an arm, strict", xlabel="change of target-step rate, in points\n(band: 95 % of unedited against unedited)")
    axes.tick_params("y", length=0)


def _sizes(study: StudyRecord) -> str:
    """n and clusters of both modes."""
    first = study.record["variants"][0]
    single, joint = first["single"], first["joint"]
    return (
        f"n = {count(single['n'])} onsets of {count(single['tasks'])} tasks (single), "
        f"{count(joint['n'])} of {count(joint['tasks'])} (joint)"
    )


@styled
def dose_curves(study: StudyRecord) -> Figure:
    """Each variant's effect over the doses, with the band of random directions at the primary dose."""
    record, primary = study.record, study.record["primary_dose"]
    figure = figure_of(
        0.9 + 2.3 * ((len(record["variants"]) + 1) // 2),
        f"Feature {record['feature']} of {record['dictionary']}: effect by dose",
        f"Shaded: 95 % intervals over tasks; {_sizes(study)}.\nEvery panel has its own scale. "
        f"Grey bar: 95 % of random directions at dose {primary:g}, edited singly.",
    )
    for axes, variant in _panels(figure, record["variants"]):
        controls = variant["controls"]
        axes.bar(primary, 100 * (controls["high"] - controls["low"]), bottom=100 * controls["low"], width=0.24, color=BAND, zorder=0)
        for mode, (name, color, marker) in MODES.items():
            rows = variant[mode]["doses"]
            dose, mean, low, high = ([row[key] for row in rows] for key in ("dose", "mean", "low", "high"))
            axes.fill_between(dose, 100 * np.array(low), 100 * np.array(high), color=color, alpha=0.18, linewidth=0)
            axes.plot(dose, 100 * np.array(mean), color=color, marker=marker, markersize=4, linewidth=1.4, label=name)
        axes.axhline(0, color=SINGLE, linewidth=0.8, zorder=1)
        axes.set_xticks([dose for dose in dose if dose == int(dose)])
        axes.set_title(f"{variant['variant']} in {variant['model']}, predicted {'up' if variant['predicted_sign'] > 0 else 'down'}")
    figure.axes[0].legend()
    figure.supylabel(POINTS, fontsize=9.5)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("dose, in multiples of s")
    return figure


@styled
def control_histograms(study: StudyRecord) -> Figure:
    """Where the feature stands among random directions of the same delivered length, per variant."""
    record = study.record
    first = record["variants"][0]["controls"]
    figure = figure_of(
        0.9 + 2.1 * ((len(record["variants"]) + 1) // 2),
        f"Feature {record['feature']} of {record['dictionary']} among random directions",
        f"{count(first['count'])} {first['family']} directions a variant, moved as far as the feature's edit at dose {record['primary_dose']:g}; mean over\n"
        f"n = {count(record['variants'][0]['single']['n'])} onsets of {count(record['variants'][0]['single']['tasks'])} tasks, each edited alone. "
        "p: share of directions as far from zero, two-sided.",
    )
    for axes, variant in _panels(figure, record["variants"]):
        controls, effect = variant["controls"], 100 * study.primary(variant, "single")["mean"]
        means = 100 * np.array(controls["means"])
        ends = np.array([means.min(), means.max()])
        axes.hist(means, bins=20, range=tuple(ends) if np.ptp(ends) else tuple(ends + (-1e-6, 1e-6)), color=FAINT, label="random directions")
        axes.axvspan(100 * controls["low"], 100 * controls["high"], color=BAND, alpha=0.5, zorder=0, label="95 % of them")
        axes.axvline(effect, color=TARGET, linewidth=2, label="the feature")
        axes.set_title(f"{variant['variant']} in {variant['model']}: p {p_value(controls['rank_p'])}")
    figure.axes[0].legend()
    figure.supylabel("directions", fontsize=9.5)
    for axes in figure.axes[-2:]:
        axes.set_xlabel(POINTS)
    return figure


def _panels(figure: Figure, variants: Sequence[Record]) -> list[tuple[Axes, Record]]:
    """Two panels a row, one a variant."""
    rows = (len(variants) + 1) // 2
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes in grid[len(variants) :]:
        axes.remove()
    return list(zip(grid, variants, strict=False))


@styled
def layer_curves(layers: Record) -> Figure:
    """P(target tokens) at step onsets after every block, for both models on both renderings."""
    curves = layers["curves"]
    models, renderings = (list(dict.fromkeys(curve[key] for curve in curves)) for key in ("model", "rendering"))
    sizes = "; ".join(f"{curve['model']} on {curve['rendering']}: {count(curve['n'])}, {count(curve['tasks'])}" for curve in curves)
    figure = figure_of(
        4.6, "Where in depth the target tokens become likely",
        f"Stream after each block read through the final norm and the unembedding. Shaded: 95 % intervals over tasks.\n"
        f"Step onsets and tasks: {sizes}.",
    )  # fmt: skip
    axes = figure.add_subplot()
    least = min((row["mean"] for curve in curves for row in curve["layers"] if row["mean"] > 0), default=1e-6)
    for curve in curves:
        color = (REFERENCE, TARGET)[models.index(curve["model"]) % 2]
        line, marker = (("-", "o"), ("--", "s"))[renderings.index(curve["rendering"]) % 2]
        layer, mean, low, high = (np.array([row[key] for row in curve["layers"]]) for key in ("layer", "mean", "low", "high"))
        axes.fill_between(layer, np.maximum(low, least / 3), np.maximum(high, least / 3), color=color, alpha=0.15, linewidth=0)
        axes.plot(
            layer, np.maximum(mean, least / 3), line, marker=marker, markersize=4.5, color=color,
            label=f"{curve['model']} on {curve['rendering']} texts",
        )  # fmt: skip
    axes.axhline(0.01, color=FAINT, linewidth=1, linestyle=":")
    axes.annotate("1 %", (1, 0.01), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yscale("log")
    axes.set_ylim(bottom=least / 2)
    in_percent(axes, "y")
    axes.set_xticks(sorted({row["layer"] for curve in curves for row in curve["layers"]}))
    axes.set(xlabel="after block", ylabel="P(target tokens) at step onsets")
    figure.legend(loc="outside right upper")
    return figure


def describe(study: StudyRecord) -> str:
    """The forest in words, for those who cannot see it."""
    parts = [f"{v['variant']}: {points_interval(study.primary(v, 'single'))} points singly, {points_interval(study.primary(v, 'joint'))} jointly" for v in study.record["variants"]]  # fmt: skip
    return f"Effects of feature {study.record['feature']} at dose {number(study.record['primary_dose'])}. " + "; ".join(parts)
