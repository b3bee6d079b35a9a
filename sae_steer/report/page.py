"""One offline page from a run's records.

1. Read what the run folder holds; what is missing is named with the command that makes it.
2. Draw the charts and write each as PNG and SVG under `figures/`.
3. Fill the template, charts inlined: no script, no request, and the same records give the same bytes.
"""

from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from matplotlib.figure import Figure

from sae_steer.errors import InputError, SteerError
from sae_steer.files import replacing, write_text
from sae_steer.outputs import writing
from sae_steer.progress import Progress, silent
from sae_steer.report import figures, numbers
from sae_steer.report.answer import answer, verdict
from sae_steer.report.atlas_figure import atlas_figure
from sae_steer.report.depth_figure import depth_figure, describe_depth
from sae_steer.report.drawing import png_and_svg
from sae_steer.report.effect_figures import control_histograms, describe, dose_curves, effect_forest, task_effects
from sae_steer.report.heads_figure import describe_heads, heads_figure
from sae_steer.report.run import Record, RunRecords
from sae_steer.report.trace_figure import describe_trace, trace_by_block, traced
from sae_steer.study.record import Study, TokenSet
from sae_steer.study.table import without_plans

PAGE_FILE, FIGURES_FOLDER = "report.html", "figures"
FORMATS = (
    numbers.count,
    numbers.number,
    numbers.percent,
    numbers.points,
    numbers.p_value,
    numbers.points_interval,
    numbers.percent_interval,
    numbers.share_interval,
    numbers.log_odds_interval,
)


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    name: str
    """Of its files, without the ending."""
    alt: str
    """In words, for those who cannot see it."""
    draw: Callable[[], Figure]


def write_report(run: Path, *, force: bool = False, on_step: Progress = silent) -> Path:
    """Write `report.html` and `figures/` into a run folder from the records in it; returns the page's path.

    Args:
        force: put a page or figures that somebody else made aside.
    """
    run = Path(run)
    with _as_written(run):
        records = RunRecords.read(run)
        drawings = charts(records)
        figures = [f"{FIGURES_FOLDER}/{chart.name}.{ending}" for chart in drawings for ending in ("png", "svg")]
        with writing(run, [PAGE_FILE, *figures], force=force):
            return _write(run, records, drawings, on_step)


@contextmanager
def _as_written(run: Path) -> Iterator[None]:
    """A record changed by hand, its seal taken out, may hold anything anywhere: that is one line too."""
    try:
        yield
    except SteerError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, UndefinedError) as error:
        raise InputError(
            f"a record in {run} has another shape than this version writes ({' '.join(str(error).split())[:200]}); "
            "make the records anew with --force"
        ) from error


def _write(run: Path, records: RunRecords, drawings: list["Chart"], on_step: Progress) -> Path:
    images = {}
    for done, chart in enumerate(drawings):
        on_step(done, len(drawings), chart.name)
        png, svg = png_and_svg(chart.draw())
        for ending, content in (("png", png), ("svg", svg)):
            with replacing(run / FIGURES_FOLDER / f"{chart.name}.{ending}") as scratch:
                scratch.write_bytes(content)
        images[chart.name] = {"alt": chart.alt, "source": f"data:image/svg+xml;base64,{b64encode(svg).decode()}"}
    written = write_text(run / PAGE_FILE, page(records, images))
    on_step(len(drawings), len(drawings), PAGE_FILE)
    return written


def charts(run: RunRecords) -> list[Chart]:
    """Every chart these records allow."""
    drawings = []
    named = [(one.name, one.record) for one in run.dictionaries if "density_heldout" in one.record]
    if named:
        alt = "How many features of each dictionary fire how often on held-out rows; the dead are tabled above."
        drawings.append(Chart("density", alt, partial(figures.firing_density, named)))
    if run.scan and run.features:
        alt = "How often each feature fires in the two models, the first ones tabled below."
        drawings.append(Chart("firing", alt, partial(figures.firing_scatter, run.scan, run.features, run.studied_here)))
    for folder in run.studies:
        if folder.study.tested:
            drawings += _charts_of_study(folder.name, folder.study)
    if run.atlas and run.atlas_table is not None:
        alt = "How specific every feature is against what it causes, a panel an intervention, counted below."
        drawings.append(Chart("atlas", alt, partial(atlas_figure, run.atlas, run.atlas_table)))
    if run.layers and run.layers["curves"]:
        alt = "Probability of the target tokens over the layers, tabled below."
        drawings.append(Chart("layers", alt, partial(figures.layer_curves, run.layers)))
        if run.layers["patching"]:
            drawings.append(Chart("depth", describe_depth(run.layers), partial(depth_figure, run.layers)))
    if run.heads:
        drawings.append(Chart("heads", describe_heads(run.heads), partial(heads_figure, run.heads)))
    return drawings


def _charts_of_study(name: str, study: Study) -> list[Chart]:
    drawn = [
        Chart(f"{name}-effects", describe(study), partial(effect_forest, study)),
        Chart(f"{name}-doses", "The effects over the doses, tabled below.", partial(dose_curves, study)),
        Chart(f"{name}-controls", "The edit among control directions.", partial(control_histograms, study)),
        Chart(f"{name}-tasks", "The mean effect in every task.", partial(task_effects, study)),
    ]
    if traced(study):
        drawn.append(Chart(f"{name}-trace", describe_trace(study), partial(trace_by_block, study)))
    return drawn


def page(run: RunRecords, images: dict[str, dict[str, str]]) -> str:
    """The page's HTML; `images` are {chart: alt text and source}."""
    environment = Environment(
        loader=PackageLoader("sae_steer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {form.__name__: form for form in FORMATS} | {
        "verdict": verdict,
        "without_plans": without_plans,
    }
    return environment.get_template("report.html.j2").render(
        run=run, images=images, answer=answer(run), target_tokens=_target_tokens(run)
    )


def _target_tokens(run: RunRecords) -> TokenSet | Record | None:
    """The measured tokens, from the first record that names them."""
    of_studies = [folder.study.target_tokens for folder in run.studies if folder.study.tested]
    others = [record["target_tokens"] for record in (run.atlas, run.layers) if record]
    return next((tokens for tokens in [*of_studies, *others] if tokens), None)
