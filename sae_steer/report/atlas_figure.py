"""The atlas as one chart: how specific every feature is, against what it causes."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

from sae_steer.interventions.atlas import BEYOND, COMMON, INSIDE, OPEN, OPPOSITE, RARE
from sae_steer.report.drawing import BAND, FAINT, REFERENCE, RELEASED, SINGLE, TARGET, figure_of, spread, styled
from sae_steer.report.numbers import MINUS, count, number
from sae_steer.report.run import Record

LOOKS = {
    RARE: ("fires too rarely to be ablated", FAINT, "x", 18),
    INSIDE: ("inside the bound", REFERENCE, "o", 22),
    OPEN: ("neither inside nor beyond it", SINGLE, "D", 18),
    COMMON: ("beyond it, as controls are", "#E69F00", "s", 24),
    OPPOSITE: ("beyond it the other way, as few controls are", RELEASED, "v", 30),
    BEYOND: ("beyond it as predicted, as few controls are", TARGET, "^", 34),
}
"""By tag, the most telling on top: label, colour, marker, size."""
NULL = "#9ecae1"
NAMED = 3
"""Features named in each panel: those that move the measure most."""
TITLES = {
    "inject": "injected into",
    "subtract": "subtracted in",
    "zero_ablate": "zero-ablated in",
    "upstream": "injected upstream in",
}


@styled
def atlas_figure(record: Record, table: Mapping[str, np.ndarray]) -> Figure:
    """Log-odds of firing in the two models against the effect at dose 1, a panel a variant."""
    bound, variants = 100 * record["bound"]["value"], record["variants"]
    fewest = min(found["null"]["draws"] for found in variants)
    figure = figure_of(
        8.2,
        f"Specific to {record['target']}, and what it causes: {count(record['tested'])} features, four interventions",
        f"Each feature at dose 1, one onset edited at a time: exact means over n = {count(record['n'])} onsets of "
        f"{count(record['tasks'])} tasks, bars 95 % intervals over tasks.\nGrey: inside the bound of {number(bound)} "
        f"points. Blue: 95 % of {count(fewest)} control directions of the same lengths. Dots: gradient times "
        f"activation, all {count(record['alive'])} alive features.\nThe vertical axis is linear near zero and "
        "logarithmic beyond.",
    )
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    linear = _linear_part(record)
    for axes, found in zip(grid.ravel(), variants, strict=True):
        mine = {name: column[table["variant"] == found["variant"]] for name, column in table.items()}
        axes.axhspan(-bound, bound, color=BAND, alpha=0.4, linewidth=0, zorder=-2)
        axes.axhspan(
            100 * found["null"]["low"], 100 * found["null"]["high"], color=NULL, alpha=0.75, linewidth=0, zorder=-1
        )
        axes.axhline(0, color=SINGLE, linewidth=0.6, zorder=0)
        axes.scatter(
            mine["log_odds"],
            100 * mine["estimate"],
            s=3,
            color=FAINT,
            alpha=0.45,
            linewidths=0,
            rasterized=True,
            zorder=1,
        )
        _tested(axes, mine)
        _labelled(axes, mine, linear)
        arrow = "\u2191" if found["predicted_sign"] > 0 else "\u2193"
        axes.set_title(f"{TITLES[found['variant']]} {found['model']}, predicted {arrow}")
        _scaled(axes, linear)
    handles = [
        axes.scatter([], [], s=size, color=color, marker=marker, label=label)
        for label, color, marker, size in _used(table)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, bbox_to_anchor=(0.0, 0.955))
    figure.supylabel("change of P(target tokens), in points", fontsize=9.5)
    for axes in grid[-1]:
        axes.set_xlabel(f"log-odds of firing, {record['target']} against {record['reference']}")
    return figure


def _used(table: Mapping[str, np.ndarray]) -> list[tuple[str, str, str, int]]:
    return [look for tag, look in LOOKS.items() if (table["tag"] == tag).any()]


def _tested(axes: Axes, rows: Mapping[str, np.ndarray]) -> None:
    for level, (tag, (_, color, marker, size)) in enumerate(LOOKS.items(), 3):
        chosen = rows["tag"] == tag
        x, y = rows["log_odds"][chosen], 100 * rows["mean"][chosen]
        low, high = 100 * rows["low"][chosen], 100 * rows["high"][chosen]
        axes.vlines(x, low, high, color=color, linewidth=0.8, alpha=0.6, zorder=level)
        edge = {} if marker == "x" else {"edgecolors": "white", "linewidths": 0.5}
        axes.scatter(x, y, s=size, color=color, marker=marker, zorder=level, **edge)


def _labelled(axes: Axes, rows: Mapping[str, np.ndarray], linear: float) -> None:
    """The names of the features that move the measure most, apart from one another."""
    order = np.argsort(-np.nan_to_num(np.abs(rows["mean"])), kind="stable")[:NAMED]
    order = [i for i in order if rows["tested"][i]]
    heights = spread([_height(100 * rows["mean"][i], linear) for i in order], 0.28)
    halo = [withStroke(linewidth=2.2, foreground="white")]
    for i, height in zip(order, heights, strict=True):
        axes.annotate(
            str(rows["feature"][i]),
            (rows["log_odds"][i], 100 * rows["mean"][i]),
            xytext=(6, 9 * (height - _height(100 * rows["mean"][i], linear)) / 0.28),
            textcoords="offset points",
            va="center",
            fontsize=8,
            path_effects=halo,
            zorder=12,
        )


def _height(value: float, linear: float) -> float:
    """Where a value stands on the axis, in decades from the linear part."""
    return float(np.sign(value) * np.log10(1 + 9 * abs(value) / linear))


def _linear_part(record: Record) -> float:
    """The power of ten, in points, within which the axis is linear: where control directions lie."""
    reach = [100 * max(abs(found["null"][end]) for end in ("low", "high")) for found in record["variants"]]
    return float(10 ** np.floor(np.log10(max(np.median(reach), 1e-6))))


def _scaled(axes: Axes, linear: float) -> None:
    axes.set_yscale("symlog", linthresh=linear, linscale=0.9)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", MINUS) if value else "0"))
