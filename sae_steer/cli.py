"""The command line: each command parses, makes one call, and prints the path of what it wrote.

Paths go to stdout, all else to stderr. Exit codes: 0 done, 1 a problem told in one line, 2 wrong usage.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from sae_steer.errors import SteerError
from sae_steer.settings import (
    DEFAULT_LAYER,
    DEFAULT_PAIR,
    PRESETS,
    CacheSettings,
    CorpusSettings,
    InterveneSettings,
    LayersSettings,
    PairTrainingSettings,
    SAESettings,
    ScanSettings,
)

# OpenMP threads that spin while they wait slow every other process down, and themselves with it: a training
# step beside one busy process took 8 s spinning and 1 s waiting. Read once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class SteerGroup(click.Group):
    """Turns what a user can mend into a one-line message and exit code 1."""

    def invoke(self, ctx: click.Context):
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SteerError as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except BrokenPipeError:
            raise  # click ends quietly where the reader of stdout has gone
        except OSError as error:
            raise click.ClickException(f"{error}; free space, or name a folder that can be used") from error
        except KeyboardInterrupt as error:
            raise click.ClickException(
                "interrupted; what is finished is kept, and the same command goes on from there"
            ) from error


@click.group(cls=SteerGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="sae-steer")
def main() -> None:
    """Two trained language models that differ in training, and what a feature of one does to their behaviour.

    \b
    The whole study on the embedded pair:
        sae-steer run
    """


def shared(*options: Callable) -> Callable:
    """Several option decorators as one."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


pair_option = click.option("--pair", default=DEFAULT_PAIR, help="A packaged pair, or a folder with a pair.toml.")
out_option = click.option("--out", type=click.Path(path_type=Path), help="Where to write.  [default: the usual place]")
cache_option = click.option(
    "--cache",
    "cache_folder",
    type=click.Path(path_type=Path),
    help="The activation cache.  [default: activations/PAIR]",
)
sae_option = click.option(
    "--sae",
    "sae_folder",
    type=click.Path(path_type=Path),
    help="The dictionary's folder.  [default: the target model's]",
)
layer_option = click.option("--layer", default=DEFAULT_LAYER, help="The block after which the stream is read.")
force_option = click.option("--force", is_flag=True, help="Replace what was made with other settings.")
seed_option = click.option("--seed", default=0, type=click.IntRange(min=0), help="Fixes every random choice.")
COUNT, SOME = click.IntRange(min=1), click.IntRange(min=0)
"""How many, at least one; and how many, none allowed."""
places_options = shared(pair_option, cache_option)
dictionary_options = shared(pair_option, cache_option, sae_option, layer_option)


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

    loaded, places = _open(pair, cache_folder, out)
    report = run_study(loaded, places, feature=feature, force=force, progress=Bar, log=TrainingBar(Bar("train-sae")))
    click.echo(report)


@main.command("train-pair")
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), default=PairTrainingSettings.preset, help="Shape of both models."
)
@click.option(
    "--init", type=click.Choice(["shared", "separate"]), default=PairTrainingSettings.init,
    help="shared: both continue one model trained on an equal mix; separate: two random starts.",
)  # fmt: skip
@click.option("--tokens", default=PairTrainingSettings.tokens, type=COUNT, help="Training tokens a model.")
@click.option("--lr", default=PairTrainingSettings.lr, help="Peak learning rate.")
@click.option("--precision", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Of matrix products.")
@click.option("--out", type=click.Path(path_type=Path), help="The pair's folder.  [default: pairs/PRESET]")
@seed_option
@force_option
def train_pair(preset, init, tokens, lr, precision, out, seed, force) -> None:
    """Train two models that differ in their training text alone; resumes after a kill.

    \b
    Example:
        sae-steer train-pair --preset small --init shared
    """
    from sae_steer.pair.training import train_pair
    from sae_steer.runtime import World
    from sae_steer.terminal import Bar

    settings = PairTrainingSettings(preset=preset, init=init, tokens=tokens, lr=lr, seed=seed)
    folder = out or Path("pairs", preset)
    train_pair(folder, settings, world=World.local(precision=precision), force=force, on_step=Bar("train-pair"))
    click.echo(folder)


@main.command()
@pair_option
@click.option(
    "--layer", "layers", multiple=True, default=[DEFAULT_LAYER], help="A block after which to store; repeat for more."
)
@click.option(
    "--texts", type=click.Path(path_type=Path), help="A .txt or .jsonl file to read instead of the generated corpus."
)
@click.option(
    "--train-plans", default=CorpusSettings.train_plans, type=SOME, help="Generated plans to train dictionaries on."
)
@click.option("--scan-plans", default=CorpusSettings.scan_plans, type=SOME, help="Plans to choose a feature on.")
@click.option("--tune-plans", default=CorpusSettings.tune_plans, type=SOME, help="Plans to set its size on.")
@click.option("--confirm-plans", default=CorpusSettings.confirm_plans, type=SOME, help="Plans to test it on.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default=CacheSettings.dtype, help="Type stored.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default=CacheSettings.precision,
    help="Of matrix products.",
)
@out_option
@seed_option
@force_option
def cache(pair, layers, texts, dtype, precision, out, seed, force, **plans) -> None:
    """Store the residual streams of both models over the same texts.

    \b
    Examples:
        sae-steer cache
        sae-steer cache --layer 1 --layer 2 --texts plans.jsonl --out activations/mine
    """
    from sae_steer.cache import cache_activations
    from sae_steer.pair.texts import GeneratedTexts, TextFile
    from sae_steer.terminal import Bar

    loaded, places = _open(pair, out, None)
    source = TextFile.read(texts) if texts else GeneratedTexts(CorpusSettings(seed=seed, **plans))
    settings = CacheSettings(dtype=dtype, precision=precision)
    made = cache_activations(
        loaded, layers=layers, out=places.cache, settings=settings, source=source, force=force, on_rows=Bar("cache")
    )
    click.echo(made.folder)


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
    from sae_steer.terminal import Bar, TrainingBar

    loaded, places = _open(pair, cache_folder, None)
    cache, settings = ActivationCache.open(places.cache), SAESettings(**knobs)
    cache.check_pair(loaded)
    name = loaded.model(model or "target").name
    folder = out or places.dictionary(name, layer, settings)
    train_sae(
        cache, model=name, layer=layer, out=folder, settings=settings, force=force, log=TrainingBar(Bar("train-sae"))
    )
    click.echo(folder)


@main.command()
@dictionary_options
@click.option("--top", default=10, type=SOME, help="How many of the most specific features to print.")
@click.option("--min-rate", default=ScanSettings.min_rate, help="Least firing rate at the target model's onsets.")
@click.option("--max-q", default=ScanSettings.max_q, help="Largest q over all features.")
@click.option("--min-ratio", default=ScanSettings.min_ratio, help="Least ratio of the two models' rates.")
@out_option
@force_option
def scan(pair, cache_folder, sae_folder, layer, top, min_rate, max_q, min_ratio, out, force) -> None:
    """Rank the features of a dictionary by how specific they are to the target model at step onsets.

    \b
    Example:
        sae-steer scan --top 10
    """
    from sae_steer.study import find_or_scan
    from sae_steer.terminal import Bar

    loaded, places, cache, dictionary = _open_dictionary(pair, cache_folder, sae_folder, layer)
    cache.check_pair(loaded)
    folder = out or places.scan
    settings = ScanSettings(min_rate=min_rate, max_q=max_q, min_ratio=min_ratio)
    found = find_or_scan(cache, dictionary, folder, settings=settings, force=force, on_rows=Bar("scan"))
    click.echo(found.table(top), err=True)
    click.echo(folder)


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

    loaded, places, cache, dictionary = _open_dictionary(pair, cache_folder, sae_folder, layer)
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


@main.command()
@places_options
@click.option("--prompts", default=LayersSettings.prompts, type=COUNT, help="Texts a rendering at most.")
@out_option
@seed_option
@force_option
def layers(pair, cache_folder, prompts, out, seed, force) -> None:
    """P(target) at step onsets after every block, in both models.

    \b
    Example:
        sae-steer layers
    """
    from sae_steer.cache import ActivationCache
    from sae_steer.study import find_or_read_layers
    from sae_steer.terminal import Bar

    loaded, places = _open(pair, cache_folder, None)
    settings = LayersSettings(prompts=prompts, seed=seed)
    cache, folder = ActivationCache.open(places.cache), out or places.layers
    click.echo(find_or_read_layers(loaded, cache, folder, settings=settings, force=force, on_step=Bar("layers")).parent)


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


def _open(pair: str, cache_folder: Path | None, run_folder: Path | None):
    """The pair, and where its files lie."""
    from sae_steer.pair.model_pair import load_pair
    from sae_steer.study import Places

    loaded = load_pair(pair)
    usual = Places.of(loaded.name)
    return loaded, Places(cache_folder or usual.cache, run_folder or usual.run)


def _open_dictionary(pair: str, cache_folder: Path | None, sae_folder: Path | None, layer: int):
    """The pair, its places, the cache and the dictionary that the options name."""
    from sae_steer.cache import ActivationCache
    from sae_steer.dictionary import load_dictionary

    loaded, places = _open(pair, cache_folder, None)
    folder = sae_folder or places.dictionary(loaded.target.name, layer)
    return loaded, places, ActivationCache.open(places.cache), load_dictionary(folder)
