"""Learning dictionaries from a cache."""

from dataclasses import replace
from itertools import product

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import (
    COUNT,
    Knob,
    force_option,
    keep_option,
    layer_option,
    on_own_device,
    open_pair,
    out_option,
    places_options,
    precision_option,
    say_precision,
)
from sae_steer.errors import visible
from sae_steer.sae.rules import RULES
from sae_steer.settings import SAESettings


@main.command("train-sae")
@places_options
@layer_option
@click.option(
    "--model",
    "models",
    multiple=True,
    help="The model whose stream is learned; repeat for more.  [default: target]",
)
@click.option(
    "--arch", default=SAESettings.architecture, help=f"{', '.join(RULES)}, or saelens:NAME; knobs as in NAME,KNOB=1."
)
@click.option(
    "--k", "ks", multiple=True, default=[SAESettings.k], type=COUNT, help="Active features a row; may repeat."
)
@click.option("--d-sae", "widths", multiple=True, default=[SAESettings.d_sae], type=COUNT, help="Features; may repeat.")
@click.option(
    "--seed", "seeds", multiple=True, default=[0], type=click.IntRange(min=0), help="Fixes the start; may repeat."
)
@click.option("--rows", default=SAESettings.rows, type=COUNT, help="Rows read in all.")
@click.option("--batch-size", default=SAESettings.batch_size, type=COUNT, help="Rows a step.")
@click.option(
    "--lr", "peak", type=Knob(SAESettings, "lr"), help="Peak learning rate.  [default: 2e-3 * sqrt(4096 / d_sae)]"
)
@click.option(
    "--warmup",
    type=Knob(SAESettings, "warmup"),
    default=SAESettings.warmup,
    help="Share of the steps in which the learning rate rises.",
)
@click.option(
    "--k-warmup",
    type=Knob(SAESettings, "k_warmup"),
    default=SAESettings.k_warmup,
    help="Share of the steps in which k falls from four times.",
)
@click.option("--patience", "wait", type=COUNT, help="Rows without a better FVE before it ends.  [default: never]")
@precision_option
@click.option(
    "--log", "trackers", multiple=True, type=click.Choice(["tensorboard", "wandb"]), help="Also tell these; may repeat."
)
@keep_option
@out_option
@force_option
def train_sae(
    pair, cache_folder, layer, models, arch, ks, widths, seeds, peak, wait, trackers, keep, out, force, **knobs
) -> None:
    """Learn dictionaries from the cache, all in one reading of it; SAELens folders, resumed after a kill.

    \b
    Example:
        sae-steer train-sae --model adhd --layer 2 --k 40 --d-sae 4096
        sae-steer train-sae --arch batchtopk --seed 0 --seed 1 --seed 2
        sae-steer train-sae --arch saelens:gated,l1_coefficient=2
        torchrun --nproc-per-node 2 -m sae_steer train-sae
    """
    from sae_steer.cache import ActivationCache
    from sae_steer.dictionary import Wanted, kept_precision, train_saes
    from sae_steer.effects.splicing import find_or_splice
    from sae_steer.terminal import Bar, TrainingBar
    from sae_steer.world import joined

    loaded, places = open_pair(pair, cache_folder, None)
    cache = ActivationCache.open(places.cache, pair=loaded, keep_special_tokens=keep)
    cache.check_pair(loaded)
    wanted, knobs = [], {**knobs, "architecture": arch, "lr": peak, "patience": wait}
    for model, k, width, seed in product(models or ["target"], ks, widths, seeds):
        name, settings = loaded.model(model).name, SAESettings(k=k, d_sae=width, seed=seed, **knobs)
        wanted.append(Wanted(name, settings, places.dictionary(name, layer, settings)))
    if out is not None:
        wanted = [replace(one, out=out if len(wanted) == 1 else out / one.out.name) for one in wanted]
    with joined(precision=knobs["precision"]) as world:
        begun = None if force else kept_precision(wanted[0].out)
        say_precision(world, begun, f"the dictionary in {wanted[0].out}")
        bar = TrainingBar(Bar("train-sae"))
        learned = train_saes(cache, wanted, layer=layer, force=force, log=bar, trackers=trackers, world=world)
    if world.is_first:
        for one, dictionary in zip(wanted, learned, strict=True):
            find_or_splice(on_own_device(loaded), cache, dictionary, one.out, force=force)
            _tell_left_out(dictionary.record)
            click.echo(one.out)


def _tell_left_out(record: dict) -> None:
    """On which rows the dictionary was learned and judged, where they are not all."""
    from sae_steer.row_filter import LeftOut

    for split, counted in record.get("rows_left_out", {}).items():
        if told := LeftOut(**counted).sentence(split):
            click.echo(visible(told), err=True)
