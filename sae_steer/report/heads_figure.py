"""All heads of two models: how alike they attend, which was matched with which, and what plans lose without each."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_steer.report.drawing import BAND, FAINT, SINGLE, TARGET, figure_of, styled
from sae_steer.report.numbers import count, number
from sae_steer.report.run import Record

WAYS = ("zero", "mean")


@styled
def heads_figure(heads: Record) -> Figure:
    """Centred cosines of all heads with the assignment, and the changes of Spearman(complexity, steps)."""
    ablations = heads["ablations"]
    figure = figure_of(
        4.6,
        "Which head of one model does what a head of the other does",
        f"Attention by structure, {count(heads['texts'])} texts of {count(heads['tasks'])} tasks. "
        "Circles: the one-to-one assignment. Star: the step-layout-broadcast heads.",
    )
    panels = figure.subplots(1, 2, width_ratios=(1.15, 1)) if ablations else [figure.add_subplot()]
    _draw_cosines(figure, panels[0], heads)
    if ablations:
        _draw_ablations(panels[1], heads)
    return figure


def describe_heads(heads: Record) -> str:
    """The figure in words."""
    return f"Cosines between the attention profiles of all heads of the two models. {heads['summary']}."


def _draw_cosines(figure: Figure, axes: Axes, heads: Record) -> None:
    shown = axes.imshow(heads["centred"], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    names = [
        sorted({match["pair"][side] for match in heads["matches"]}, key=_place) for side in ("reference", "target")
    ]
    rows, columns = ({name: at for at, name in enumerate(own)} for own in names)
    for match in heads["matches"]:
        pair = match["pair"]
        axes.plot(
            columns[pair["target"]], rows[pair["reference"]], "o", mfc="none", color=SINGLE, markersize=3.5, mew=0.8
        )
    broadcast = heads["broadcast"]
    if broadcast["target"] in columns and broadcast["reference"] in rows:
        axes.plot(columns[broadcast["target"]], rows[broadcast["reference"]], "*", color=SINGLE, markersize=11)
    for ticks, own, label in (("y", names[0], heads["reference"]), ("x", names[1], heads["target"])):
        first = [at for at, name in enumerate(own) if name.endswith("H0")]
        setter = {"x": (axes.set_xticks, axes.set_xlabel), "y": (axes.set_yticks, axes.set_ylabel)}[ticks]
        setter[0](first, [own[at] for at in first])
        setter[1](f"heads of {label}")
    figure.colorbar(shown, ax=axes, shrink=0.8, label="centred cosine")


def _draw_ablations(axes: Axes, heads: Record) -> None:
    ablations, marked = heads["ablations"], heads["broadcast"]["target"]
    for at, way in enumerate(WAYS):
        effects = [effect for effect in ablations["effects"] if effect["way"] == way]
        changes = sorted(effect["change"]["value"] for effect in effects)
        places = [at + (i / max(len(changes) - 1, 1) - 0.5) * 0.6 for i in range(len(changes))]
        axes.plot(places, changes, ".", color=FAINT, markersize=5)
        own = next((effect for effect in effects if effect["head"] == marked), None)
        if own is None:
            continue
        change = own["change"]
        place = at + (changes.index(change["value"]) / max(len(changes) - 1, 1) - 0.5) * 0.6
        axes.plot([place, place], [change["low"], change["high"]], color=TARGET, linewidth=1.5)
        axes.plot(place, change["value"], "*", color=TARGET, markersize=11)
        axes.text(place, change["high"], f" {marked}, p {own['p_heads']:.2f}", color=TARGET, fontsize=8.5)
    axes.axhline(0, color=BAND, linewidth=1)
    axes.set_xticks(range(len(WAYS)), [f"head at {way}" for way in WAYS])
    axes.set_ylabel("change of Spearman(complexity, steps)")
    baseline = number(ablations["baseline"]["value"])
    axes.set_title(f"{ablations['model']}: {baseline} with all heads")


def _place(name: str) -> tuple[int, int]:
    """`L3H5` -> (3, 5)."""
    layer, head = name[1:].split("H")
    return int(layer), int(head)
