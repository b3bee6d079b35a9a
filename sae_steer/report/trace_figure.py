"""Where each edit goes: what the blocks above carry of it and add to it, drawn from a study's record."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_steer.report.drawing import ABOVE, JOINT, REFERENCE, SINGLE, TARGET, figure_of, styled
from sae_steer.report.numbers import count, points_interval
from sae_steer.report.run import Record, StudyRecord

PARTS = {
    "attention": ("added by the block's attention", REFERENCE, "s"),
    "mlp": ("added by its MLP", JOINT, "D"),
}
CARRIED = "carried after the block"


def traced(study: StudyRecord) -> list[Record]:
    """The variants whose edit was followed upwards and moved something."""
    return [v for v in study.record["variants"] if v.get("trace") and v["trace"]["blocks"][0]["n"]]


@styled
def trace_by_block(study: StudyRecord) -> Figure:
    """By block: the length of what the edit changes, and how much of it the target's unembedding reads."""
    variants = traced(study)
    figure = figure_of(
        1.3 + 1.9 * len(variants),
        f"{study.title}: where the edit goes, block by block (dose {study.record['primary_dose']:g})",
        "Each onset edited alone and followed at its own position; means over the onsets that the edit moves. The\n"
        "first point is the edit itself. Direct: what the final norm and the unembedding make of it, norms and\n"
        "attention frozen; whole: the effect at the same onsets. In points, with 95 % intervals over tasks.",
    )
    panels = figure.subplots(len(variants), 2, squeeze=False)
    for (left, right), variant in zip(panels, variants, strict=True):
        blocks, direct = variant["trace"]["blocks"], variant["trace"]["direct"]
        _panel(left, blocks, "norm")
        left.set_ylim(bottom=0)
        left.set_title(f"{variant['variant']} in {variant['model']}, n = {count(blocks[0]['n'])}")
        _panel(right, blocks, "projection")
        right.axhline(0, color=SINGLE, linewidth=0.8, zorder=1)
        right.set_title(
            f"direct {points_interval(direct)}\nwhole {points_interval(direct['whole'])} points", fontsize=8.5
        )
    panels[0, 0].legend(**{**ABOVE, "bbox_to_anchor": (-0.01, 1.12)})
    for axes, label in zip(panels[-1], ("length", "projection on the target tokens' unembedding"), strict=True):
        axes.set_xlabel(f"block; {label}")
    return figure


def _panel(axes: Axes, blocks: list[Record], what: str) -> None:
    for part, (label, color, marker) in {"resid": (CARRIED, TARGET, "o"), **PARTS}.items():
        rows = [row for row in blocks if row[f"{part}_{what}"] is not None]
        values = [row[f"{part}_{what}"] for row in rows]
        axes.plot([row["block"] for row in rows], values, color=color, marker=marker, markersize=4, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def describe_trace(study: StudyRecord) -> str:
    """The figure in words, for those who cannot see it."""
    parts = []
    for variant in traced(study):
        first, last = variant["trace"]["blocks"][0], variant["trace"]["blocks"][-1]
        ends = f"{first['resid_norm']:.3g} after block {first['block']}, {last['resid_norm']:.3g} after {last['block']}"
        parts.append(f"{variant['variant']} changes the stream by a length of {ends}")
    return f"{study.title}: {'; '.join(parts)}."
