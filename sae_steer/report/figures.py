"""The run's charts, each a function of records: how often features fire, overall and in each model, and the layers."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator

from sae_steer.report.drawing import (
    ABOVE,
    FAINT,
    REFERENCE,
    RELEASED,
    SINGLE,
    TARGET,
    figure_of,
    in_percent,
    spread,
    styled,
)
from sae_steer.report.numbers import count, setting
from sae_steer.report.run import Record

RELEASED_HITS = {"target": 5181, "reference": 3, "onsets": 8770}
"""Feature 2504 of the released adhd_L2 dictionary, at onsets of adhd text (its three_probes.json)."""


@styled
def firing_scatter(scan: Record, table: Mapping[str, np.ndarray], studied: Mapping[int, str]) -> Figure:
    """Every feature's firing rate at step onsets in the two models, on log axes; zeros stand at the axis.

    Args:
        studied: of some features, what became of them.
    """
    target, reference = scan["target"], scan["reference"]
    figure = figure_of(
        6.3,
        f"How often each feature fires in {target} and in {reference}",
        f"{count(scan['alive'])} of {count(scan['d_sae'])} features of {scan['dictionary']} that fire at all; the same "
        f"n = {count(scan['onsets'])} step onsets of {count(scan['tasks'])} tasks read in both models.\n"
        "Bars: 95 % Wilson intervals at the design effect of the tasks.",
    )
    axes, floor = figure.add_subplot(), min(0.4 / scan["onsets"], 1e-4)
    x, y = (np.maximum(table[f"{model}_rate"], floor) for model in ("reference", "target"))
    specific, alive = table["specific"].astype(bool), table["alive"].astype(bool)
    for shown, color, size, label in (
        (alive & ~specific, FAINT, 9, "other features"),
        (specific, TARGET, 13, f"specific to {target} ({count(scan['primary_count'])})"),
    ):
        axes.scatter(x[shown], y[shown], s=size, color=color, linewidths=0, alpha=0.6, rasterized=True, label=label)
    _released(axes)
    _criteria(axes, scan["criteria"], floor)
    _rate_axes(axes, floor)
    _labelled(axes, table, _names(scan, studied), floor)
    axes.set_xlabel(f"fires at this share of onsets in {reference}")
    axes.set_ylabel(f"fires at this share of onsets in {target}")
    axes.legend(**ABOVE, ncols=2)
    return figure


def _released(axes: Axes) -> None:
    hits, misses, onsets = RELEASED_HITS.values()
    label = f"released feature 2504 ({hits} and {misses} of {onsets} onsets)"
    axes.plot(
        misses / onsets,
        hits / onsets,
        "*",
        color=RELEASED,
        markersize=13,
        markeredgecolor="white",
        label=label,
        zorder=4,
    )


def _criteria(axes: Axes, criteria: Record, floor: float) -> None:
    line, ratio = {"color": FAINT, "linewidth": 0.9, "zorder": 1}, criteria["min_ratio"]
    axes.plot([floor, 1], [floor, 1], **line, label="equal rates")
    axes.plot([floor, 1 / ratio], [ratio * floor, 1], **line, linestyle="--", label=f"ratio {ratio:g}")
    axes.axhline(criteria["min_rate"], **line, linestyle=":", label=f"least rate {setting(criteria['min_rate'])}")


def _rate_axes(axes: Axes, floor: float) -> None:
    ticks = [floor, *(tick for tick in (1e-4, 1e-3, 1e-2, 0.1, 1.0) if tick > 2 * floor)]
    labels = ["0", *map(setting, ticks[1:])]
    axes.set(xscale="log", yscale="log", xlim=(0.7 * floor, 1.4), ylim=(0.7 * floor, 1.4))
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(FixedLocator([]))
        axis.set_ticklabels(labels)


def _names(scan: Record, studied: Mapping[int, str]) -> dict[int, str]:
    """Why a feature is labelled."""
    reasons: dict[int, list[str]] = {}
    if scan["top"]:
        reasons.setdefault(scan["top"][0]["feature"], []).append("top")
    if scan["like_2504"]:
        reasons.setdefault(scan["like_2504"]["feature"], []).append("like-2504")
    for feature, fate in studied.items():
        reasons.setdefault(feature, []).append(fate)
    return {feature: f"{feature}: {', '.join(why)}" for feature, why in reasons.items()}


def _labelled(axes: Axes, table: Mapping[str, np.ndarray], names: Mapping[int, str], floor: float) -> None:
    """Points with interval bars and names; names that would overlap are moved up."""
    places = {int(feature): row for row, feature in enumerate(table["feature"])}
    drawn = []
    for feature in names:
        ends = {}
        for model in ("reference", "target"):
            parts = (float(table[f"{model}_rate{part}"][places[feature]]) for part in ("_low", "", "_high"))
            ends[model] = [max(part, floor) for part in parts]
        drawn.append(ends)
    heights = spread([float(np.log10(ends["target"][1])) for ends in drawn], 0.17)
    for name, ends, height in zip(names.values(), drawn, heights, strict=True):
        (x, xerr), (y, yerr) = (
            (mid, [[max(mid - low, 0)], [max(high - mid, 0)]]) for low, mid, high in (ends["reference"], ends["target"])
        )
        axes.errorbar(x, y, yerr, xerr, fmt="o", color=SINGLE, markersize=5, capsize=2, linewidth=1.1, zorder=5)
        halo = [withStroke(linewidth=2.5, foreground="white")]
        beside = (1.25 * max(x, ends["reference"][2]), 10**height)
        axes.annotate(name, beside, va="center", fontsize=8.5, zorder=6, path_effects=halo)


@styled
def firing_density(named: Sequence[tuple[str, Record]]) -> Figure:
    """How many features of each dictionary fire how often on held-out rows, a panel a dictionary.

    Args:
        named: dictionaries' names and their training records.
    """
    figure = figure_of(
        0.9 + 1.7 * len(named),
        "How often features fire on held-out rows",
        "Features in each quarter of a decade of the firing rate; those that never fire there are in no bar.",
    )
    panels = figure.subplots(len(named), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, record) in zip(panels, named, strict=True):
        density = record["density_heldout"]
        axes.stairs(density["counts"], density["log10_edges"], fill=True, color=SINGLE, alpha=0.7)
        dead, rows = count(density["dead"]), count(record["heldout_rows"])
        axes.set_title(f"{name}: n = {rows} rows, {count(sum(density['counts']))} features fire, {dead} never")
        axes.set_ylabel("features")
        axes.xaxis.set_major_locator(MultipleLocator(1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: setting(10**value)))
    panels[-1].set_xlabel("fires in this share of the rows")
    return figure


@styled
def layer_curves(layers: Record) -> Figure:
    """P(target tokens) at step onsets after every block, for both models on both renderings."""
    curves = layers["curves"]
    models, renderings = (list(dict.fromkeys(curve[key] for curve in curves)) for key in ("model", "rendering"))
    figure = figure_of(
        4.6,
        "Where in depth the target tokens become likely",
        "Stream after each block, read through the final norm and the unembedding. Shaded: 95 % intervals over tasks.",
    )
    axes = figure.add_subplot()
    least = min((row["mean"] for curve in curves for row in curve["layers"] if row["mean"] > 0), default=1e-6)
    for curve in curves:
        color = (REFERENCE, TARGET)[models.index(curve["model"]) % 2]
        line, marker = (("-", "o"), ("--", "s"))[renderings.index(curve["rendering"]) % 2]
        layer = [row["layer"] for row in curve["layers"]]
        mean, low, high = ([max(row[key], least / 3) for row in curve["layers"]] for key in ("mean", "low", "high"))
        sizes = f"n = {count(curve['n'])} onsets, {count(curve['tasks'])} tasks"
        label = f"{curve['model']} on {curve['rendering']} texts ({sizes})"
        axes.fill_between(layer, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(layer, mean, line, marker=marker, markersize=4.5, color=color, label=label)
    axes.axhline(0.01, color=FAINT, linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(bottom=least / 2)
    in_percent(axes, "y")
    axes.set_xticks(sorted({row["layer"] for curve in curves for row in curve["layers"]}))
    axes.set(xlabel="after block", ylabel="P(target tokens) at step onsets")
    axes.legend(**ABOVE, ncols=2)
    return figure
