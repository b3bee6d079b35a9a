"""Learning dictionaries from a cache."""

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import COUNT, force_option, layer_option, open_pair, out_option, places_options, seed_option
from sae_steer.settings import SAESettings


@main.command("train-sae")
@places_options
@layer_option
@click.option("--model", help="The model whose stream is learned.  [default: the target model]")
@click.option("--k", default=SAESettings.k, type=COUNT, help="Active features a row.")
@click.option("--d-sae", default=SAESettings.d_sae, type=COUNT, help="Features.")
@click.option("--rows", default=SAESettings.rows, type=COUNT, help="Rows read in all.")
@click.option("--batch-size", default=SAESettings.batch_size, type=COUNT, help="Rows a step.")
@click.option("--lr", default=SAESettings.lr, help="Peak learning rate.")
@click.option(
    "--precision", type=click.Choice(["bfloat16", "float32"]), default=SAESettings.precision, help="Of the encoder."
)
@out_option
@seed_option
@force_option
def train_sae(pair, cache_folder, layer, model, out, force, **knobs) -> None:
    """Learn a TopK dictionary from the cache; written as a SAELens folder, resumes after a kill.

    \b
    Example:
        sae-steer train-sae --model adhd --layer 2 --k 40 --d-sae 4096
    """
    from sae_steer.cache import ActivationCache
    from sae_steer.dictionary import train_sae
    from sae_steer.interventions.splicing import find_or_splice
    from sae_steer.terminal import Bar, TrainingBar

    loaded, places = open_pair(pair, cache_folder, None)
    cache, settings = ActivationCache.open(places.cache), SAESettings(**knobs)
    cache.check_pair(loaded)
    name = loaded.model(model or "target").name
    folder = out or places.dictionary(name, layer, settings)
    dictionary = train_sae(
        cache, model=name, layer=layer, out=folder, settings=settings, force=force, log=TrainingBar(Bar("train-sae"))
    )
    find_or_splice(loaded, cache, dictionary, folder, force=force)
    click.echo(folder)
