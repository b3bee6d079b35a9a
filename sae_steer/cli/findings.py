"""What differs between the models: features by onset firing, target probability by layer."""

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import (
    COUNT,
    SOME,
    Knob,
    dictionary_options,
    force_option,
    keep_option,
    on_own_device,
    open_dictionary,
    open_pair,
    out_option,
    places_options,
    say_exact,
    seed_option,
)
from sae_steer.errors import visible
from sae_steer.settings import HeadsSettings, LayersSettings, ScanSettings


@main.command()
@dictionary_options
@click.option("--top", default=10, type=SOME, help="How many of the most specific features to print.")
@click.option(
    "--min-rate",
    type=Knob(ScanSettings, "min_rate"),
    default=ScanSettings.min_rate,
    help="Least firing rate at the target model's onsets.",
)
@click.option(
    "--max-q", type=Knob(ScanSettings, "max_q"), default=ScanSettings.max_q, help="Largest q over all features."
)
@click.option(
    "--min-ratio",
    type=Knob(ScanSettings, "min_ratio"),
    default=ScanSettings.min_ratio,
    help="Least ratio of the two models' rates.",
)
@keep_option
@out_option
@force_option
def scan(pair, cache_folder, sae_folder, layer, top, min_rate, max_q, min_ratio, keep, out, force) -> None:
    """Rank the features of a dictionary by how specific they are to the target model at step onsets.

    \b
    Example:
        sae-steer scan --top 10
    """
    from sae_steer.pipeline import find_or_scan
    from sae_steer.terminal import Bar

    loaded, places, cache, dictionary = open_dictionary(pair, cache_folder, sae_folder, layer, keep=keep)
    cache.check_pair(loaded)
    folder = out or places.scan
    settings = ScanSettings(min_rate=min_rate, max_q=max_q, min_ratio=min_ratio)
    found = find_or_scan(cache, dictionary, folder, settings=settings, force=force, on_rows=Bar("scan"))
    click.echo(visible(found.table(top)), err=True)
    click.echo(folder)


@main.command()
@places_options
@click.option("--prompts", default=LayersSettings.prompts, type=COUNT, help="Texts a rendering at most.")
@out_option
@seed_option
@force_option
def layers(pair, cache_folder, prompts, out, seed, force) -> None:
    """P(target) at step onsets after every block, and what putting one model's stream into the other moves there.

    \b
    Example:
        sae-steer layers
    """
    from sae_steer.cache import ActivationCache
    from sae_steer.pipeline import find_or_read_layers, where_it_moves
    from sae_steer.terminal import Bar

    loaded, places = open_pair(pair, cache_folder, None)
    on_own_device(loaded)
    say_exact()
    settings = LayersSettings(prompts=prompts, seed=seed)
    cache, folder = ActivationCache.open(places.cache, pair=loaded), out or places.layers
    record = find_or_read_layers(loaded, cache, folder, settings=settings, force=force, on_step=Bar("layers"))
    if sentence := where_it_moves(record, None):
        click.echo(visible(sentence), err=True)
    click.echo(record.parent)


@main.command()
@places_options
@click.option("--prompts", default=HeadsSettings.prompts, type=COUNT, help="Texts a rendering at most.")
@click.option(
    "--ablation-prompts",
    default=HeadsSettings.ablation_prompts,
    type=SOME,
    help="Plans sampled of every seed without each head; 0 leaves the ablations out.",
)
@click.option(
    "--ablation-seeds",
    default=HeadsSettings.ablation_seeds,
    type=COUNT,
    help="Samples of every plan without each head.",
)
@click.option(
    "--means",
    default=HeadsSettings.means,
    type=click.Choice(["layer", "all"]),
    help="Which heads are held at their mean too: the broadcast head's layer, or all.",
)
@out_option
@seed_option
@force_option
def heads(pair, cache_folder, prompts, ablation_prompts, ablation_seeds, means, out, seed, force) -> None:
    """Match attention heads across the pair by what they attend to, then sample plans without each.

    \b
    Example:
        sae-steer heads
    """
    from sae_steer.cache import ActivationCache
    from sae_steer.pipeline import find_or_study_heads
    from sae_steer.records import read_json
    from sae_steer.terminal import Bar

    loaded, places = open_pair(pair, cache_folder, None)
    on_own_device(loaded)
    say_exact()
    settings = HeadsSettings(
        prompts=prompts,
        ablation_prompts=ablation_prompts,
        ablation_seeds=ablation_seeds,
        means=means,
        seed=seed,
    )
    cache, folder = ActivationCache.open(places.cache, pair=loaded), out or places.heads
    record = find_or_study_heads(loaded, cache, folder, settings=settings, force=force, on_step=Bar("heads"))
    click.echo(visible(read_json(record)["summary"]), err=True)
    click.echo(record.parent)
