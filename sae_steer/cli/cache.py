"""Caching residual streams."""

from pathlib import Path

import click
from click.core import ParameterSource

from sae_steer.cli.group import main
from sae_steer.cli.options import (
    COUNT,
    SOME,
    Place,
    force_option,
    open_pair,
    out_option,
    pair_option,
    precision_option,
    say_precision,
    seed_option,
    shares_option,
)
from sae_steer.settings import DEFAULT_LAYER, SPLITS, CacheSettings, CorpusSettings


@main.command()
@pair_option
@click.option(
    "--layer", "layers", multiple=True, default=[DEFAULT_LAYER], help="A block after which to store; repeat for more."
)
@click.option("--texts", type=Place(), help="A .txt or .jsonl file to read instead of the generated corpus.")
@click.option(
    "--train-plans", default=CorpusSettings.train_plans, type=SOME, help="Generated plans to train dictionaries on."
)
@click.option("--scan-plans", default=CorpusSettings.scan_plans, type=SOME, help="Plans to choose a feature on.")
@click.option("--tune-plans", default=CorpusSettings.tune_plans, type=SOME, help="Plans to set its size on.")
@click.option("--confirm-plans", default=CorpusSettings.confirm_plans, type=SOME, help="Plans to test it on.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "auto"]),
    default=CacheSettings.dtype,
    help="Type stored; auto: float16 if the first texts leave room in it, else bfloat16.",
)
@precision_option
@click.option(
    "--rows-per-shard",
    type=COUNT,
    help="Rows a shard holds at most, which bounds memory.  [default: 65536, fewer where streams are wide]",
)
@shares_option
@out_option
@seed_option
@force_option
def cache(pair, layers, texts, dtype, precision, rows_per_shard, shares, out, seed, force, **plans) -> None:
    """Store the residual streams of both models over the same texts.

    \b
    Examples:
        sae-steer cache
        sae-steer cache --layer 1 --layer 2 --texts plans.jsonl --out activations/mine
    """
    from sae_steer.cache import begun_precision, cache_activations
    from sae_steer.pair.texts import GeneratedTexts, TextFile
    from sae_steer.terminal import Bar
    from sae_steer.world import joined

    loaded, places = open_pair(pair, out, None)
    _refuse_unused(texts)
    source = TextFile.read(texts, shares) if texts else GeneratedTexts(CorpusSettings(seed=seed, **plans))
    request = {"layers": layers, "out": places.cache, "source": source, "force": force}
    with joined(precision=precision) as world:
        begun = None if force else begun_precision(places.cache)
        say_precision(world, begun, f"the cache in {places.cache}")
        request["settings"] = CacheSettings(dtype=dtype, precision=precision, rows_per_shard=rows_per_shard)
        made = cache_activations(loaded, **request, on_rows=Bar("cache"), world=world)
        if world.is_first:
            if cut := made.manifest.get("texts_cut"):
                click.echo(
                    f"{cut} texts were longer than the pair's {loaded.context} tokens; their ends are left out",
                    err=True,
                )
            click.echo(made.folder)


def _refuse_unused(texts: Path | None) -> None:
    """Plans are counted where they are generated, shares of tasks where a file is read: refused elsewhere."""
    named = click.get_current_context().get_parameter_source
    idle = [f"{split}_plans" for split in SPLITS] if texts else ["shares"]
    for parameter in click.get_current_context().command.params:
        if parameter.name in idle and named(parameter.name) is ParameterSource.COMMANDLINE:
            where = "with --texts, whose tasks are dealt by --split-shares" if texts else "without --texts"
            raise click.UsageError(f"{parameter.opts[0]} means nothing {where}")
