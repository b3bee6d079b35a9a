"""The atlas as one chart: how specific every feature is, against what it causes."""

from collections.abc import Mapping

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter

from sae_steer.atlas.survey import BEYOND, COMMON, INSIDE, OPEN, OPPOSITE, RARE
from sae_steer.edits.variants import variant_named
from sae_steer.report.drawing import ABOVE, BAND, FAINT, REFERENCE, RELEASED, SINGLE, TARGET, figure_of, spread, styled
from sae_steer.report.numbers import MINUS, count, number
from sae_steer.report.run import Record

LOOKS = {
    RARE: ("fires at too few onsets to be ablated", FAINT, "X", 5),
    INSIDE: ("inside the bound", REFERENCE, "o", 5),
    OPEN: ("neither inside nor beyond the bound for certain", SINGLE, "D", 4.5),
    COMMON: ("beyond the bound, as controls are", "#E69F00", "s", 5),
    OPPOSITE: ("beyond the bound the other way, as few controls are", RELEASED, "v", 6),
    BEYOND: ("beyond the bound as predicted, as few controls are", TARGET, "^", 6),
}
"""By tag, the most telling last and on top: label, colour, marker, size."""
NULL = "#9ecae1"
ARROW = {1: "\u2191", -1: "\u2193"}
NAMED = 3
"""Features named in a panel: those that move the measure most."""
TICKS = (0.1, 0.5, 1, 2, 5, 10, 20, 50)


@styled
def atlas_figure(record: Record, table: Mapping[str, np.ndarray]) -> Figure:
    """Log-odds of firing in the two models against the effect at dose 1, a panel a variant.

    Heights are signed square roots, so that a bound and effects a hundredth of it are both seen.
    """
    bound, variants = 100 * record["bound"]["value"], record["variants"]
    figure = figure_of(
        8.4,
        f"Specific to {record['target']}, and what it causes: {count(record['tested'])} features, "
        f"{len(variants)} interventions",
        f"At dose 1, one onset edited at a time: means over n = {count(record['n'])} onsets of "
        f"{count(record['tasks'])} tasks; bars: 95 % intervals over tasks.\nControl directions have the features' "
        "own lengths. Numbers: those that move the measure most. Heights: square roots.",
    )
    grid = figure.subplots((len(variants) + 1) // 2, 2, sharex=True, sharey=True, squeeze=False)
    panels = grid.ravel()[: len(variants)]
    for empty in grid.ravel()[len(variants) :]:
        empty.remove()
    for axes, variant in zip(panels, variants, strict=True):
        mine = {name: column[table["variant"] == variant["variant"]] for name, column in table.items()}
        null = [100 * variant["null"][end] for end in ("low", "high")]
        axes.set_yscale("function", functions=(_root, _square))
        axes.axhspan(-bound, bound, color=BAND, alpha=0.4, linewidth=0, zorder=-2)
        axes.axhspan(*null, color=NULL, alpha=0.75, linewidth=0, zorder=-1)
        axes.axhline(0, color=SINGLE, linewidth=0.6, zorder=0)
        dots = {"color": FAINT, "alpha": 0.5, "linewidths": 0, "rasterized": True}
        axes.scatter(mine["log_odds"], 100 * mine["estimate"], s=3.5, zorder=1, **dots)
        _tested(axes, mine)
        title = f"{_titled(variant['variant'])} {variant['model']}, predicted {ARROW[variant['predicted_sign']]}"
        axes.text(0.02, 0.975, title, transform=axes.transAxes, va="top", fontsize=10)
    _scaled(grid[0, 0], table, bound)
    _labelled(panels, variants, table)
    for axes, handles in zip(grid[0], _legends(record, table), strict=True):
        axes.legend(handles=handles, **ABOVE)
    figure.supylabel("change of P(target tokens), in points", fontsize=9.5)
    for axes in panels[-2:]:
        axes.set_xlabel(f"log-odds of firing, {record['target']} against {record['reference']}")
    return figure


def _titled(variant: str) -> str:
    """What was done, before the name of the model it was done to."""
    kind = variant_named(variant)
    return kind.title if kind else f"{variant} in"


def _tested(axes: Axes, rows: Mapping[str, np.ndarray]) -> None:
    for level, (tag, (_, color, marker, size)) in enumerate(LOOKS.items(), 3):
        chosen = rows["tag"] == tag
        x, (low, mean, high) = rows["log_odds"][chosen], (100 * rows[key][chosen] for key in ("low", "mean", "high"))
        axes.vlines(x, low, high, color=color, linewidth=0.9, alpha=0.6, zorder=level)
        axes.plot(x, mean, marker, color=color, markersize=size, markeredgecolor="white", zorder=level)


def _labelled(panels: np.ndarray, variants: list[Record], table: Mapping[str, np.ndarray]) -> None:
    """The names of the features that move the measure most, those that would overlap moved up."""
    halo = [withStroke(linewidth=2.2, foreground="white")]
    for axes, variant in zip(panels, variants, strict=True):
        tested = np.flatnonzero((table["variant"] == variant["variant"]) & (table["tag"] != ""))
        most = tested[np.argsort(-np.abs(table["mean"][tested]), kind="stable")][:NAMED]
        low, high = _root(np.array(axes.get_ylim()))
        roots = spread(_root(100 * table["mean"][most]).tolist(), 0.036 * float(high - low))
        for row, height in zip(most, _square(np.array(roots)), strict=True):
            axes.annotate(
                str(table["feature"][row]),
                (table["log_odds"][row], height),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                path_effects=halo,
                zorder=12,
            )


def _legends(record: Record, table: Mapping[str, np.ndarray]) -> tuple[list[Artist], list[Artist]]:
    """What the tested features' marks mean, and what stands behind them."""
    draws = min(variant["null"]["draws"] for variant in record["variants"])
    ranked = " or ".join(count(n) for n in sorted({variant["ranked_onsets"] for variant in record["variants"]}))
    used = [look for tag, look in LOOKS.items() if (table["tag"] == tag).any()]
    point, bound = {"linestyle": "", "markeredgecolor": "white"}, number(100 * record["bound"]["value"])
    marks = [Line2D([], [], color=c, marker=m, markersize=s, label=label, **point) for label, c, m, s in reversed(used)]
    dots = f"all {count(record['alive'])} alive features, by gradient times activation"
    return marks, [
        Patch(color=BAND, alpha=0.4, label=f"inside the bound of {bound} points"),
        Patch(color=NULL, alpha=0.75, label=f"95 % of {count(draws)} or more control directions, at {ranked} onsets"),
        Line2D([], [], color=FAINT, marker=".", linestyle="", markersize=4, label=dots),
    ]


def _scaled(axes: Axes, table: Mapping[str, np.ndarray], bound: float) -> None:
    """The same on both sides of zero, the bound and every interval inside."""
    reach = [np.nanmax(np.abs(100 * table[key])) for key in ("estimate", "low", "high")]
    limit = 1.15 * max(bound, *reach)
    ticks = [tick for tick in TICKS if tick < limit]
    axes.set_ylim(-limit, limit)
    axes.yaxis.set_major_locator(FixedLocator([-tick for tick in reversed(ticks)] + [0, *ticks]))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", MINUS) if value else "0"))


def _root(value: np.ndarray) -> np.ndarray:
    return np.sign(value) * np.sqrt(np.abs(value))


def _square(value: np.ndarray) -> np.ndarray:
    return np.sign(value) * np.square(value)
