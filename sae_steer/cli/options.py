"""Options that several commands share, and what they open."""

from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import click
from click.core import ParameterSource

from sae_steer.arguments import check
from sae_steer.errors import InputError
from sae_steer.settings import AUTO, DEFAULT_LAYER, DEFAULT_PAIR, PRECISIONS, SplitShares


def shared(*options: Callable) -> Callable:
    """Several option decorators as one."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class Place(click.Path):
    """A path that was named: an empty one, as from a variable that is not set, would mean the current folder."""

    def __init__(self, **known: bool) -> None:
        super().__init__(path_type=Path, **known)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """The path, or a usage error."""
        if value == "":
            self.fail("the path is empty; name one, or . for the current folder", param, ctx)
        return super().convert(value, param, ctx)


pair_option = click.option("--pair", default=DEFAULT_PAIR, help="A packaged pair, or a folder with a pair.toml.")
out_option = click.option("--out", type=Place(), help="Where to write.  [default: the usual place]")
cache_option = click.option(
    "--cache",
    "cache_folder",
    type=Place(),
    help="The activation cache.  [default: activations/PAIR]",
)
sae_option = click.option(
    "--sae",
    "sae_folder",
    type=Place(),
    help="The dictionary's folder, ours or any of SAELens.  [default: the target model's]",
)
layer_option = click.option("--layer", default=DEFAULT_LAYER, help="The block after which the stream is read.")
force_option = click.option(
    "--force", is_flag=True, help="Replace what was made otherwise; put aside what others made."
)
seed_option = click.option("--seed", default=0, type=click.IntRange(min=0), help="Fixes every random choice.")
precision_option = click.option(
    "--precision",
    type=click.Choice([AUTO, *PRECISIONS]),
    default=AUTO,
    help="Of matrix products; auto: as it was begun, else bfloat16 where the device multiplies it natively.",
)
keep_option = click.option(
    "--keep-special-tokens",
    "keep",
    is_flag=True,
    help="Count the rows of special tokens and rows of ten times the usual length, which are left out otherwise.",
)


class Knob(click.ParamType):
    """A number as a field of the settings takes it, refused under the option's own name."""

    name = "float"

    def __init__(self, settings: type, field: str) -> None:
        self.hint = get_type_hints(settings, include_extras=True)[field]

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """The number, or a usage error that says what the option takes."""
        try:
            number = float(value) if isinstance(value, str) else value
        except ValueError:
            number = value
        try:
            return check(param.opts[0] if param else "the value", number, self.hint)
        except InputError as error:
            self.fail(str(error), param, ctx)


class Shares(click.ParamType):
    """Four shares by commas."""

    name = "train,scan,tune,confirm"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> SplitShares:
        """The shares, or a usage error that says what they take."""
        if isinstance(value, SplitShares):
            return value
        try:
            train, scan, tune, confirm = map(float, str(value).split(","))
            return SplitShares(train, scan, tune, confirm)
        except ValueError:
            self.fail(f"{value} is no four numbers; give such as 0.4,0.15,0.1,0.35", param, ctx)
        except InputError as error:
            self.fail(str(error), param, ctx)


shares_option = click.option(
    "--split-shares", "shares", type=Shares(),
    help="Shares of a text file's tasks to train, scan, tune and confirm.  [default: 0.6,0.18,0.06,0.16]",
)  # fmt: skip
COUNT, SOME = click.IntRange(min=1), click.IntRange(min=0)
"""How many, at least one; and how many, none allowed."""
places_options = shared(pair_option, cache_option)
dictionary_options = shared(pair_option, cache_option, sae_option, layer_option)


def open_pair(pair: str, cache_folder: Path | None, run_folder: Path | None):
    """The pair, and where its files lie."""
    from sae_steer.pair.model_pair import load_pair
    from sae_steer.pipeline import Places

    loaded = load_pair(pair)
    usual = Places.of(loaded.name)
    return loaded, Places(cache_folder or usual.cache, run_folder or usual.run)


def on_own_device(loaded):
    """The pair, moved to the GPU if there is one, for commands that run its models in one process."""
    from sae_steer.world import World

    return loaded.to(World.local().device)


def say_precision(world, begun: str | None = None, what: str = "it") -> None:
    """Say in one line on stderr at which precision `world` runs, or refuse another than `what` was begun at."""
    from sae_steer.capability import decide

    decision = decide(world.wanted, world.device.type, begun=begun, what=what)
    if world.is_first:
        click.echo(decision.line, err=True)


def say_exact() -> None:
    """Say on stderr that a measurement runs in float32, whatever the machine multiplies faster."""
    click.echo("precision float32, always: what is read from replays and gates is exact in it", err=True)


def open_dictionary(pair: str, cache_folder: Path | None, sae_folder: Path | None, layer: int, *, keep: bool = False):
    """The pair, its places, the cache and the dictionary that the options name."""
    from sae_steer.cache import ActivationCache
    from sae_steer.dictionary import load_dictionary

    loaded, places = open_pair(pair, cache_folder, None)
    cache = ActivationCache.open(places.cache, pair=loaded, keep_special_tokens=keep)
    folder = sae_folder or places.dictionary(loaded.target.name, layer)
    dictionary = load_dictionary(folder, model=loaded.target, layer=layer)
    asked = click.get_current_context().get_parameter_source("layer") is ParameterSource.COMMANDLINE
    if asked and dictionary.layer != layer:
        raise InputError(f"the dictionary in {folder} is of layer {dictionary.layer}, not {layer}; leave --layer out")
    return loaded, places, cache, dictionary
