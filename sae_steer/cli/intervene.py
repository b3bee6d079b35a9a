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
from sae_steer.settings import InterveneSettings


@main.command()
@dictionary_options
@click.option("--feature", default="top", help="An index of the dictionary, top, or like-2504.")
@click.option(
    "--scan",
    "scan_folder",
    type=click.Path(path_type=Path),
    help="The scan that top and like-2504 read.  [default: runs/PAIR/scan]",
)
@click.option("--prompts", default=InterveneSettings.prompts, type=COUNT, help="Confirm-split texts at most.")
@click.option(
    "--generations", default=InterveneSettings.generations, type=SOME, help="Sampled plans an arm; 0 for none."
)
@out_option
@seed_option
@force_option
def intervene(
    pair, cache_folder, sae_folder, layer, feature, scan_folder, prompts, generations, out, seed, force
) -> None:
    """Inject, subtract, zero-ablate, inject upstream: what a feature does to the target probability.

    \b
    Examples:
        sae-steer intervene --feature 2504
        sae-steer intervene --feature top
    """
    from sae_steer.scan import load_scan, resolve_index
    from sae_steer.study import find_or_intervene
    from sae_steer.terminal import Bar

    loaded, places, cache, dictionary = open_dictionary(pair, cache_folder, sae_folder, layer)
    if feature in ("top", "like-2504"):
        index = load_scan(scan_folder or places.scan, dictionary).resolve(feature)
    else:
        index = resolve_index(feature, dictionary.sae.config.d_sae)
    folder = out or places.intervene(index)
    settings = InterveneSettings(prompts=prompts, generations=generations, seed=seed)
    study = find_or_intervene(
        loaded, cache, dictionary, index, folder, settings=settings, force=force, on_step=Bar("intervene")
    )
    click.echo(f"feature {index} of {dictionary.name}: {study.record['note']}", err=True)
    click.echo(study.table(), err=True)
    click.echo(folder)
