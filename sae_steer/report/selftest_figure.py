"""How often the verdict is right, as one chart: verdicts by kind, the level of the rank test, and the power."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sae_steer.report.drawing import FAINT, REFERENCE, SINGLE, TARGET, figure_of, in_percent, styled
from sae_steer.report.numbers import count
from sae_steer.report.run import Record
from sae_steer.study.verdict import CAUSAL, INCONCLUSIVE, INVALID, NON_SPECIFIC, NULL, OPPOSITE

SHOWN = (CAUSAL, NULL, INCONCLUSIVE, NON_SPECIFIC, OPPOSITE, INVALID)

AT_THE_BOUND = {"neither": (INCONCLUSIVE, NON_SPECIFIC)}


@styled
def selftest_figure(record: Record) -> Figure:
    """Verdicts by kind of planted pair and variant, the rank test's level by family, and power by planted effect."""
    studies = sum(record["studies"].values())
    figure = figure_of(
        7.4,
        "How often the verdict is right on planted pairs",
        f"n = {count(studies)} studies, each of a planted pair and newly drawn tasks; the truth is measured on every "
        "text of the population.\nOutlined: the verdict that is right. Bars: 95 % intervals, exact over studies; of "
        "the level, resampling studies.",
    )
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    _confusion(figure.add_subplot(grid[0, :]), record["confusion"], record["due"])
    _level(figure.add_subplot(grid[1, 0]), record["level"])
    _power(figure.add_subplot(grid[1, 1]), record["power"])
    return figure


def _confusion(axes: Axes, confusion: Mapping, due: Mapping) -> None:
    """One row a kind and right verdict, one column a verdict, counts over variants."""
    rows: list[tuple[str, str, Counter]] = []
    for kind, variants in confusion.items():
        for right in dict.fromkeys(due[kind].values()):
            total = Counter()
            for variant, verdicts in variants.items():
                if due[kind].get(variant) == right:
                    total.update(verdicts)
            if total:
                rows.append((kind, right, total))
    counts = np.array([[total[verdict] for verdict in SHOWN] for _, _, total in rows], float).reshape(-1, len(SHOWN))
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for (row, column), number in np.ndenumerate(counts):
        axes.text(column, row, count(int(number)), ha="center", va="center", color=SINGLE if number else FAINT)
    for row, (_, right, _) in enumerate(rows):
        for column in [i for i, verdict in enumerate(SHOWN) if verdict in AT_THE_BOUND.get(right, (right,))]:
            axes.add_patch(
                Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, edgecolor=TARGET, linewidth=1.8)
            )
    axes.set_xticks(range(len(SHOWN)), SHOWN)
    axes.set_yticks(range(len(rows)), [f"{kind} ({right})" for kind, right, _ in rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _level(axes: Axes, level: Mapping) -> None:
    for row, rate in enumerate(level.values()):
        ends = [rate["low"] if rate["low"] is not None else rate["rate"], rate["high"] or rate["rate"]]
        axes.plot(ends, [row, row], color=REFERENCE, linewidth=2)
        axes.plot(rate["rate"], row, "o", color=REFERENCE)
    axes.axvline(0.05, color=FAINT, linewidth=1)
    axes.set_yticks(range(len(level)), [f"{name}\nn = {count(rate['fresh'])}" for name, rate in level.items()])
    axes.set_ylim(-0.6, max(len(level), 1) - 0.4)
    axes.set_xlim(0, 0.12)
    in_percent(axes, "x")
    axes.set_title("fresh directions called special at 5 %")


def _power(axes: Axes, power: Sequence[Mapping]) -> None:
    for name, color in (("causal", TARGET), ("null", REFERENCE)):
        x = [row["mean"] for row in power]
        y = np.array([[row[name][part] for part in ("rate", "low", "high")] for row in power])
        if len(y):
            error = np.abs(y[:, 1:] - y[:, :1]).T
            axes.errorbar(x, y[:, 0], yerr=error, color=color, marker="o", linewidth=1.4, label=name.upper())
    axes.axvline(1, color=FAINT, linewidth=1)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks([0, 0.5, 1, 2, 4, 8, 16], ["0", ".5", "1", "2", "4", "8", "16"])
    axes.set_xlim(left=0)
    axes.set_xlabel("planted effect, in bounds")
    axes.set_title("verdicts by the size of the effect")
    in_percent(axes, "y")
    axes.legend(loc="center right")
