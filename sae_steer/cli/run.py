"""The whole study, its page, and what a path holds."""

import sys
from pathlib import Path

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import force_option, on_own_device, open_pair, pair_option, places_options
from sae_steer.settings import CONTROLS, InterveneSettings


@main.command()
@places_options
@click.option("--feature", default="top", help="An index of the dictionary, top, or like-2504.")
@click.option("--full", is_flag=True, help=f"{CONTROLS['full']} control directions a family, not {CONTROLS['quick']}.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/PAIR]")
@force_option
def run(pair, cache_folder, feature, full, out, force) -> None:
    """The whole study: cache, train-sae, scan, intervene, layers, report.

    The interventions are a first look (`intervene --quick`), and the verdict says so, unless --full.

    \b
    Example:
        sae-steer run --pair small
    """
    from sae_steer.pipeline import StudySettings, run_study
    from sae_steer.terminal import Bar, TrainingBar

    loaded, places = open_pair(pair, cache_folder, out)
    on_own_device(loaded)
    settings = StudySettings(intervene=InterveneSettings(controls=CONTROLS["full" if full else "quick"]))
    bar = TrainingBar(Bar("train-sae"))
    report = run_study(loaded, places, feature=feature, settings=settings, force=force, progress=Bar, log=bar)
    click.echo(report)


@main.command()
@pair_option
@click.option("--run", "run_folder", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/PAIR]")
def report(pair, run_folder) -> None:
    """All records of a run as one offline page.

    \b
    Example:
        sae-steer report
    """
    from sae_steer.report.page import write_report

    click.echo(write_report(run_folder or Path("runs", Path(pair).resolve().name)))


@main.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def info(path) -> None:
    """Say what a pair, cache, dictionary or record is, and whether it is whole.

    \b
    Example:
        sae-steer info activations/small
    """
    from sae_steer.info import describe

    description, whole = describe(path)
    click.echo(description)
    if not whole:
        sys.exit(1)
