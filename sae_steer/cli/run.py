"""The whole study, its page, and what a path holds."""

import os
import sys
from pathlib import Path

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import (
    Place,
    force_option,
    keep_option,
    open_pair,
    pair_option,
    places_options,
    precision_option,
    say_precision,
    shares_option,
)
from sae_steer.errors import visible
from sae_steer.settings import (
    AUTO,
    CONTROLS,
    DEFAULT_LAYER,
    CacheSettings,
    HeadsSettings,
    InterveneSettings,
    SAESettings,
)


@main.command()
@places_options
@click.option("--feature", default="top", help="An index of the dictionary, top, or like-2504.")
@click.option(
    "--full",
    is_flag=True,
    help=f"{CONTROLS['full']} control directions a family, not {CONTROLS['quick']}, sampled plans, heads.",
)
@precision_option
@click.option("--out", type=Place(), help="The run's folder.  [default: runs/PAIR]")
@keep_option
@force_option
def run(pair, cache_folder, feature, full, precision, keep, out, force) -> None:
    """The whole study: cache, train-sae, scan, intervene, layers, report.

    The interventions are a first look, and the verdict says so, unless --full: small control families, as by
    `intervene --quick`, and no sampled plans, which no verdict rests on. --full studies the heads as well.

    \b
    Example:
        sae-steer run --pair small
    """
    from sae_steer.cache import begun_precision
    from sae_steer.dictionary import kept_precision
    from sae_steer.findings.layer_probability import RECORD_FILE
    from sae_steer.pipeline import check_writable, run_study, where_it_moves
    from sae_steer.terminal import Bar, TrainingBar
    from sae_steer.world import World

    loaded, places = open_pair(pair, cache_folder, out)
    check_writable(places.run)
    world = World.local(precision=precision)
    loaded.to(world.device)
    settings = study_settings(full=full, precision=precision)
    cached = None if force else begun_precision(places.cache)
    learned = None if force else kept_precision(places.dictionary(loaded.target.name, DEFAULT_LAYER, settings.sae))
    say_precision(world, cached, f"the cache in {places.cache}")
    if learned != cached:
        say_precision(world, learned, "the dictionary")
    if not full:
        click.echo(f"a first look ({CONTROLS['quick']} controls a family, no sampled plans); --full has more", err=True)
    bar = TrainingBar(Bar("train-sae"))
    report = run_study(
        loaded, places, feature=feature, settings=settings, keep=keep, force=force, progress=Bar, log=bar
    )
    if sentence := where_it_moves(places.layers / RECORD_FILE):
        click.echo(sentence, err=True)
    click.echo(report)


def study_settings(*, full: bool = False, precision: str = AUTO):
    """The settings of every stage, as the command's options say them."""
    from sae_steer.pipeline import StudySettings

    return StudySettings(
        cache=CacheSettings(precision=precision),
        sae=SAESettings(precision=precision),
        intervene=InterveneSettings() if full else InterveneSettings(controls=CONTROLS["quick"], generations=0),
        heads=HeadsSettings() if full else None,
    )


@main.command()
@pair_option
@click.option("--run", "run_folder", type=Place(), help="The run's folder.  [default: runs/PAIR]")
@force_option
def report(pair, run_folder, force) -> None:
    """All records of a run as one offline page.

    \b
    Example:
        sae-steer report
    """
    from sae_steer.report.page import write_report

    click.echo(write_report(run_folder or Path("runs", Path(os.path.abspath(pair)).name), force=force))


@main.command()
@click.argument("path", type=Place(exists=True))
@click.option("--texts", type=Place(), help="Also say what the pair at PATH finds in this file.")
@shares_option
def info(path, texts, shares) -> None:
    """Say what a pair, cache, dictionary or record is, and whether it is whole.

    \b
    Examples:
        sae-steer info activations/small
        sae-steer info recipes --texts recipes.jsonl
    """
    from sae_steer.info import describe, describe_texts

    description, whole = describe(path)
    click.echo(visible(description))
    if not whole:
        sys.exit(1)
    if texts is not None:
        click.echo(visible(describe_texts(path, texts, shares)))
