"""What a feature does."""

from pathlib import Path

import click
from click.core import ParameterSource

from sae_steer.cli.group import main
from sae_steer.cli.options import (
    COUNT,
    SOME,
    Knob,
    Place,
    dictionary_options,
    force_option,
    keep_option,
    on_own_device,
    open_dictionary,
    out_option,
    say_exact,
    seed_option,
)
from sae_steer.errors import visible
from sae_steer.settings import CONTROLS, POSITIONS, AtlasSettings, InterveneSettings


@main.command()
@dictionary_options
@click.option("--feature", help="An index of the dictionary, top, or like-2504.  [default: top]")
@click.option(
    "--direction",
    help="Instead of a feature: mean-difference, unembedding, random, or a .npy, .pt, .safetensors or .json file.",
)
@click.option(
    "--all-specific",
    is_flag=True,
    help="Instead: every specific feature of the scan, each onset edited alone, and an estimate for all others.",
)
@click.option(
    "--scan",
    "scan_folder",
    type=Place(),
    help="The scan that names top, like-2504 and the specific features.  [default: runs/PAIR/scan]",
)
@click.option("--quick", "size", flag_value="quick", help=f"{CONTROLS['quick']} control directions a family.")
@click.option("--final", "size", flag_value="final", help=f"{CONTROLS['final']} control directions a family.")
@click.option(
    "--positions", type=click.Choice(POSITIONS), default=InterveneSettings.positions, help="Where joint edits stand."
)
@click.option("--upstream", default=InterveneSettings.upstream, type=COUNT, help="Layers below, of that variant.")
@click.option(
    "--bound",
    type=Knob(InterveneSettings, "bound_share"),
    default=InterveneSettings.bound_share,
    help="The bound, as a share of the models' gap.",
)
@click.option("--prompts", default=InterveneSettings.prompts, type=COUNT, help="Confirm-split texts at most.")
@click.option(
    "--generations", default=InterveneSettings.generations, type=SOME, help="Sampled plans an arm; 0 for none."
)
@keep_option
@out_option
@seed_option
@force_option
def intervene(
    pair,
    cache_folder,
    sae_folder,
    layer,
    feature,
    direction,
    all_specific,
    scan_folder,
    size,
    bound,
    keep,
    out,
    force,
    **knobs,
) -> None:
    """Inject, subtract, zero-ablate, inject upstream: does a feature cause the target behaviour? Ends in a verdict.

    \b
    Examples:
        sae-steer intervene --feature 2504
        sae-steer intervene --direction mean-difference --quick
        sae-steer intervene --all-specific
    """
    from sae_steer.pipeline import find_or_intervene
    from sae_steer.terminal import Bar

    if (feature is not None) + (direction is not None) + all_specific > 1:
        raise click.UsageError("give one of --feature, --direction and --all-specific")
    if all_specific:
        _refuse_unused()
    loaded, places, cache, dictionary = open_dictionary(pair, cache_folder, sae_folder, layer, keep=keep)
    on_own_device(loaded)
    say_exact()
    if all_specific:
        shared = {knob: knobs[knob] for knob in ("upstream", "prompts", "seed")}
        settings = AtlasSettings(bound_share=bound, **shared)
        _atlas(loaded, cache, dictionary, scan_folder or places.scan, out or places.atlas, settings, force)
        return
    source, leave_out = _source(
        "top" if feature is None else feature, direction, dictionary, scan_folder or places.scan
    )
    folder = out or places.intervene(source)
    settings = InterveneSettings(controls=CONTROLS[size or "full"], bound_share=bound, **knobs)
    study = find_or_intervene(
        loaded, cache, dictionary, source, folder,
        settings=settings, leave_out=leave_out, force=force, on_step=Bar("intervene"),
    )  # fmt: skip
    click.echo(visible(f"{study.direction} of {dictionary.name}: {study.note}"), err=True)
    click.echo(visible(study.table()), err=True)
    click.echo(folder)


def _refuse_unused() -> None:
    """An option given that an atlas has no use for is wrong usage."""
    context = click.get_current_context()
    for knob, option in (
        ("size", "--quick or --final"),
        ("positions", "--positions"),
        ("generations", "--generations"),
    ):
        if context.get_parameter_source(knob) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--all-specific edits single onsets, against one pool of controls: no {option}")


def _atlas(loaded, cache, dictionary, scan_folder: Path, folder: Path, settings: AtlasSettings, force: bool) -> None:
    from sae_steer.pipeline import find_or_make_atlas
    from sae_steer.scan import load_scan
    from sae_steer.terminal import Bar

    scan = load_scan(scan_folder, dictionary)
    atlas = find_or_make_atlas(
        loaded, cache, dictionary, scan, folder, settings=settings, force=force, on_step=Bar("intervene")
    )
    click.echo(visible(atlas.summary()), err=True)
    click.echo(folder)


def _source(feature: str, direction: str | None, dictionary, scan_folder: Path):
    """What is tested, and the features that are no controls: the specific ones, if there is a scan to name them."""
    from sae_steer.edits.directions import SOURCES
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
