"""The whole study, its page, and what a path holds."""

import sys
from pathlib import Path

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import force_option, open_pair, pair_option, places_options


@main.command()
@places_options
@click.option("--feature", default="top", help="An index of the dictionary, top, or like-2504.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/PAIR]")
@force_option
def run(pair, cache_folder, feature, out, force) -> None:
    """The whole study: cache, train-sae, scan, intervene, layers, report.

    \b
    Example:
        sae-steer run --pair small
    """
    from sae_steer.study import run_study
    from sae_steer.terminal import Bar, TrainingBar

    loaded, places = open_pair(pair, cache_folder, out)
    report = run_study(loaded, places, feature=feature, force=force, progress=Bar, log=TrainingBar(Bar("train-sae")))
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
