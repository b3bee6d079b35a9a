"""Where each edit goes: what the blocks above carry of it and add to it, drawn from a study's record."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_steer.effects.trace import Trace, TraceBlock
from sae_steer.report.drawing import ABOVE, JOINT, REFERENCE, SINGLE, TARGET, figure_of, styled
from sae_steer.report.numbers import count, points_interval
from sae_steer.study.record import Study, VariantResult

PARTS = {
    "attention": ("added by the block's attention", REFERENCE, "s"),
    "mlp": ("added by its MLP", JOINT, "D"),
}
CARRIED = "carried after the block"


def traced(study: Study) -> list[tuple[VariantResult, Trace]]:
    """The variants whose edit was followed upwards and moved something, with their traces."""
    return [(variant, variant.trace) for variant in study.variants if variant.trace and variant.trace.blocks[0].n]


@styled
def trace_by_block(study: Study) -> Figure:
    """By block: the length of what the edit changes, and how much of it the target's unembedding reads."""
    variants = traced(study)
    figure = figure_of(
        1.3 + 1.9 * len(variants),
        f"{study.title}: where the edit goes, block by block (dose {study.measured.primary_dose:g})",
        "Each onset edited alone and followed at its own position; means over the onsets that the edit moves. The\n"
        "first point is the edit itself. Direct: what the final norm and the unembedding make of it, norms and\n"
        "attention frozen; whole: the effect at the same onsets. In points, with 95 % intervals over tasks.",
    )
    panels = figure.subplots(len(variants), 2, squeeze=False)
    for (left, right), (variant, trace) in zip(panels, variants, strict=True):
        _panel(left, trace.blocks, "norm")
        left.set_ylim(bottom=0)
        left.set_title(f"{variant.name} in {variant.model}, n = {count(trace.blocks[0].n)}")
        _panel(right, trace.blocks, "projection")
        right.axhline(0, color=SINGLE, linewidth=0.8, zorder=1)
        direct, whole = points_interval(trace.direct), points_interval(trace.direct.whole)
        right.set_title(f"direct {direct}\nwhole {whole} points", fontsize=8.5)
    panels[0, 0].legend(**{**ABOVE, "bbox_to_anchor": (-0.01, 1.12)})
    for axes, label in zip(panels[-1], ("length", "projection on the target tokens' unembedding"), strict=True):
        axes.set_xlabel(f"block; {label}")
    return figure


def _panel(axes: Axes, blocks: Sequence[TraceBlock], what: str) -> None:
    for part, (label, color, marker) in {"resid": (CARRIED, TARGET, "o"), **PARTS}.items():
        points = [(block.block, value) for block in blocks if (value := block.of(part, what)) is not None]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def describe_trace(study: Study) -> str:
    """The figure in words, for those who cannot see it."""
    parts = []
    for variant, trace in traced(study):
        first, last = trace.blocks[0], trace.blocks[-1]
        ends = f"{first.resid_norm:.3g} after block {first.block}, {last.resid_norm:.3g} after {last.block}"
        parts.append(f"{variant.name} changes the stream by a length of {ends}")
    return f"{study.title}: {'; '.join(parts)}."
