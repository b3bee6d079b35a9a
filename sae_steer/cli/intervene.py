"""What a feature does."""

from pathlib import Path

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import (
    COUNT,
    SOME,
    dictionary_options,
    force_option,
    open_dictionary,
    out_option,
    seed_option,
)
from sae_steer.settings import CONTROLS, POSITIONS, InterveneSettings


@main.command()
@dictionary_options
@click.option("--feature", help="An index of the dictionary, top, or like-2504.  [default: top]")
@click.option(
    "--direction",
    help="Instead of a feature: mean-difference, unembedding, random, or a .npy, .pt, .safetensors or .json file.",
)
@click.option(
    "--scan",
    "scan_folder",
    type=click.Path(path_type=Path),
    help="The scan that names top, like-2504 and the specific features.  [default: runs/PAIR/scan]",
)
@click.option("--quick", "size", flag_value="quick", help=f"{CONTROLS['quick']} control directions a family.")
@click.option("--final", "size", flag_value="final", help=f"{CONTROLS['final']} control directions a family.")
@click.option(
    "--positions", type=click.Choice(POSITIONS), default=InterveneSettings.positions, help="Where joint edits stand."
)
@click.option("--upstream", default=InterveneSettings.upstream, type=COUNT, help="Layers below, of that variant.")
@click.option("--bound", default=InterveneSettings.bound_share, help="The bound, as a share of the models' gap.")
@click.option("--prompts", default=InterveneSettings.prompts, type=COUNT, help="Confirm-split texts at most.")
@click.option(
    "--generations", default=InterveneSettings.generations, type=SOME, help="Sampled plans an arm; 0 for none."
)
@out_option
@seed_option
@force_option
def intervene(
    pair, cache_folder, sae_folder, layer, feature, direction, scan_folder, size, bound, out, force, **knobs
) -> None:
    """Inject, subtract, zero-ablate, inject upstream: does a feature cause the target behaviour? Ends in a verdict.

    \b
    Examples:
        sae-steer intervene --feature 2504
        sae-steer intervene --direction mean-difference --quick
    """
    from sae_steer.study import find_or_intervene
    from sae_steer.terminal import Bar

    if feature and direction:
        raise click.UsageError("give --feature or --direction, not both")
    loaded, places, cache, dictionary = open_dictionary(pair, cache_folder, sae_folder, layer)
    source, leave_out = _source(feature or "top", direction, dictionary, scan_folder or places.scan)
    folder = out or places.intervene(source)
    settings = InterveneSettings(controls=CONTROLS[size or "full"], bound_share=bound, **knobs)
    study = find_or_intervene(
        loaded, cache, dictionary, source, folder,
        settings=settings, leave_out=leave_out, force=force, on_step=Bar("intervene"),
    )  # fmt: skip
    click.echo(f"{study.record['direction']} of {dictionary.name}: {study.record['note']}", err=True)
    click.echo(study.table(), err=True)
    click.echo(folder)


def _source(feature: str, direction: str | None, dictionary, scan_folder: Path):
    """What is tested, and the features that are no controls: the specific ones, if there is a scan to name them."""
    from sae_steer.interventions.directions import SOURCES
    from sae_steer.scan import RECORD_FILE, load_scan, resolve_index

    scan = None
    if (scan_folder / RECORD_FILE).is_file() or (direction is None and feature in ("top", "like-2504")):
        scan = load_scan(scan_folder, dictionary)
    leave_out = None if scan is None else scan.specific_features
    if direction is not None:
        return (direction if direction in SOURCES else Path(direction)), leave_out
    if scan is not None:
        return scan.resolve(feature), leave_out
    return resolve_index(feature, dictionary.sae.config.d_sae), leave_out
