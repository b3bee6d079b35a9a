"""Where in depth the behaviour can be moved, and what attention and MLP of every block add to it."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_steer.report.drawing import ABOVE, BAND, FAINT, REFERENCE, SINGLE, TARGET, figure_of, in_percent, styled
from sae_steer.report.numbers import count
from sae_steer.report.run import Record

FLAVOURS = {"raw": ("-", "o"), "rotated": ("--", "s"), "affine": (":", "^")}
PARTS = {"attention": SINGLE, "mlp": FAINT}
CUT = (-0.5, 1.75)
"""Shares of the gap that are drawn; what lies beyond is at the edge."""


@styled
def depth_figure(layers: Record) -> Figure:
    """One model's stream in the other after every block, and the parts of each block in the target's own text."""
    patching, curve = layers["patching"], layers["curves"][-1]
    figure = figure_of(
        4.2,
        "Where in depth the behaviour can be moved",
        f"Left: {count(patching['onsets'])} onsets of {count(patching['tasks'])} tasks. Right: logit lens, "
        f"{curve['model']} on {curve['rendering']} texts. Bars and bands: 95 % intervals over tasks.",
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    _draw_patching(left, patching["patched"])
    _draw_parts(right, curve)
    return figure


def describe_depth(layers: Record) -> str:
    """The figure in words."""
    return f"What the other model's stream moves after every block: {layers['patching']['summary']}."


def _draw_patching(axes: Axes, patched: list[Record]) -> None:
    receivers = list(dict.fromkeys(row["receiver"] for row in patched))
    for receiver in receivers:
        color = (REFERENCE, TARGET)[receivers.index(receiver) % 2]
        for flavour, (line, marker) in FLAVOURS.items():
            rows = [row for row in patched if (row["receiver"], row["flavour"]) == (receiver, flavour)]
            if not rows:
                continue
            layer, share = [row["layer"] for row in rows], [_cut(row["share"]) for row in rows]
            low, high = ([_cut(row[key], row["share"]) for row in rows] for key in ("share_low", "share_high"))
            axes.fill_between(layer, low, high, color=color, alpha=0.1, linewidth=0)
            axes.plot(layer, share, line, marker=marker, markersize=4, color=color, label=f"into {receiver}, {flavour}")
    axes.axhline(0, color=BAND, linewidth=1)
    axes.axhline(1, color=BAND, linewidth=1)
    in_percent(axes, "y")
    axes.set_xticks(sorted({row["layer"] for row in patched}))
    axes.set(xlabel="the other model's stream after block", ylabel="change, share of the gap")
    axes.legend(**ABOVE, ncols=2)


def _draw_parts(axes: Axes, curve: Record) -> None:
    known = curve["layers"][0]["attention"] is not None  # else what the two write cannot be told apart
    drawn = PARTS.items() if known else [("jump", SINGLE)]
    for shift, (part, color) in zip((-0.18, 0.18), drawn, strict=False):
        rows = [row[part] for row in curve["layers"]]
        place, mean = [row["layer"] + shift for row in curve["layers"]], [row["mean"] for row in rows]
        errors = [[row["mean"] - row["low"] for row in rows], [row["high"] - row["mean"] for row in rows]]
        axes.bar(
            place, mean, width=0.34, yerr=errors, color=color, ecolor=TARGET, error_kw={"elinewidth": 1}, label=part
        )
    axes.axhline(0, color=BAND, linewidth=1)
    in_percent(axes, "y")
    axes.set(xlabel="block", ylabel="change of P(target tokens)")
    axes.legend(**ABOVE, ncols=2)


def _cut(value: float | None, otherwise: float = 0.0) -> float:
    return min(max(otherwise if value is None else value, CUT[0]), CUT[1])
