"""One look for all charts, and their bytes: the same figure is the same PNG and SVG, on one machine, every time."""

from collections.abc import Callable
from functools import wraps
from io import BytesIO
from itertools import pairwise
from typing import ParamSpec

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sae_steer.report.numbers import setting

P = ParamSpec("P")

# Okabe and Ito's colours, told apart by the colour-blind, in grey by their markers
TARGET, REFERENCE, SINGLE, JOINT, RELEASED = "#D55E00", "#0072B2", "#1b1b1b", "#009E73", "#CC79A7"
BAND, FAINT, NOTE = "#cfcfcf", "#9a9a9a", "#555555"
ABOVE = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0)}
"""Where a legend hides no data."""
WIDTH = 8.6
"""Inches: ten-point type stays readable at the width of a README."""
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": 100,
    "savefig.dpi": 170,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a name from data is text, dollars and all
    "svg.hashsalt": "sae_steer",
    "svg.fonttype": "path",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """`draw` under the report's style, whatever the user's own settings."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return inside


def png_and_svg(figure: Figure) -> tuple[bytes, bytes]:
    """The figure's two files, without dates."""
    files = []
    with style.context(["default", STYLE]):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            file = BytesIO()
            figure.savefig(file, format=kind, metadata=metadata)
            files.append(file.getvalue())
    return files[0], files[1]


def figure_of(height: float, title: str, note: str) -> Figure:
    """An empty figure that says what it shows, above, and on how much data, below."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.008, ha="left", fontsize=11.5, fontweight="bold")
    figure.supxlabel(note, x=0.008, ha="left", fontsize=8.5, color=NOTE)
    return figure


def in_percent(axes: Axes, which: str) -> None:
    """Ticks of a share of one, in percent."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: setting(value)))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def spread(heights: list[float], apart: float) -> list[float]:
    """`heights` moved up just so far that neighbours are `apart`, in the order given."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + apart)
    return moved
