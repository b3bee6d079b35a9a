"""Looking at a feature: what it fires on, and text written with and without it."""

import json
import math
from dataclasses import asdict

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import COUNT, SOME, dictionary_options, on_own_device, open_dictionary
from sae_steer.settings import ContextSettings, SteerSettings

VARIANTS = ("inject", "subtract", "zero_ablate", "upstream")


def _finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no size; give a finite number", ctx, param)
    return value


@main.command()
@click.argument("features", nargs=-1, required=True, type=SOME, metavar="INDEX...")
@dictionary_options
@click.option("--top", default=ContextSettings.top, type=SOME, help="Texts with the strongest firings.")
@click.option("--random", default=ContextSettings.random, type=SOME, help="Firings drawn at random.")
@click.option("--width", default=ContextSettings.width, type=SOME, help="Tokens shown before a firing.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout.")
@click.option("--seed", default=ContextSettings.seed, type=SOME, help="Fixes which random firings are drawn.")
def features(features, pair, cache_folder, sae_folder, layer, as_json, **knobs) -> None:
    """What features fire on, in both models; what they promote; which lie near.

    \b
    Example:
        sae-steer features 785
    """
    from sae_steer.findings.contexts import read_contexts
    from sae_steer.terminal import Bar

    loaded, _, cache, dictionary = open_dictionary(pair, cache_folder, sae_folder, layer)
    settings = ContextSettings(**knobs)
    cards = read_contexts(
        on_own_device(loaded), cache, dictionary, features, settings=settings, on_rows=Bar("features")
    )
    if as_json:
        click.echo(json.dumps([card.record for card in cards], ensure_ascii=False))
        return
    other = next(model.name for model in loaded.models if model.name != dictionary.model)
    for card in cards:
        click.echo(feature_card(card, dictionary.model, other))


@main.command()
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@dictionary_options
@click.option("--feature", type=SOME, help="An index of the dictionary.")
@click.option("--direction", help="Instead: mean-difference, unembedding, random, or a file with one vector.")
@click.option("--variant", type=click.Choice(VARIANTS), default="subtract", help="Which intervention.")
@click.option(
    "--dose", default=1.0, type=click.FloatRange(min=0), callback=_finite, help="Multiples of the direction's own size."
)
@click.option("--max-tokens", default=SteerSettings.max_tokens, type=COUNT, help="Tokens written at most.")
@click.option("--temperature", default=SteerSettings.temperature, help="Of the sampling.")
@click.option("--seed", default=SteerSettings.seed, type=SOME, help="Of the noise that both texts share.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout.")
def steer(texts, pair, cache_folder, sae_folder, layer, feature, direction, variant, dose, as_json, **knobs) -> None:
    """Text written with and without an edit, from the same noise, and what the edit costs.

    inject and upstream are written by the reference model, subtract and zero_ablate by the target model.

    \b
    Example:
        sae-steer steer "Clean the kitchen" --direction mean-difference --dose 1
        sae-steer steer "Clean the kitchen" --feature 785 --variant zero_ablate
    """
    from sae_steer.findings.steering import steer

    if (feature is None) == (direction is None):
        raise click.UsageError("give one of --feature and --direction")
    loaded, _, cache, dictionary = open_dictionary(pair, cache_folder, sae_folder, layer)
    arm = _arm(on_own_device(loaded), cache, dictionary, feature if direction is None else direction, variant)
    rows = steer(loaded, arm, texts, dose=dose, settings=SteerSettings(**knobs))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], ensure_ascii=False))
        return
    for row in rows:
        click.echo(_beside(row, arm.direction.name))


def _arm(pair, cache, dictionary, source, variant: str):
    """The one intervention asked for, made ready as a study would."""
    from pathlib import Path

    from sae_steer.edits.directions import SOURCES
    from sae_steer.errors import InputError
    from sae_steer.settings import InterveneSettings
    from sae_steer.study.of_pair import bench_of, check_inputs, find_direction

    settings = InterveneSettings()
    check_inputs(pair, cache, dictionary, settings)
    bench = bench_of(pair, dictionary, cache, cache.target_tokens(pair), settings)
    named = Path(source) if isinstance(source, str) and source not in SOURCES else source
    direction = find_direction(bench, dictionary, named)
    if direction is None:
        raise InputError(f"feature {source} fires nowhere in the tune texts, which would set its size; name another")
    arms = {arm.variant.name: arm for arm in bench.arms(direction)}
    if variant not in arms:
        raise InputError(f"{direction.name} cannot be used to {variant}; there are {', '.join(arms)}")
    return arms[variant]


def _beside(row, direction: str) -> str:
    """Both texts, step by step where they are plans, target steps marked, and the cost."""
    lines = [f"{row.prompt}: {row.edit} {direction}, dose {row.dose:g}, in {row.model}"]
    for title, written in (("as it is", row.plain), ("steered", row.steered)):
        if written.well_formed is None:
            lines += [f"  {title}:", f"    {_visible(written.text)}"]
            continue
        form = "" if written.well_formed else ", not well formed"
        lines.append(f"  {title}: {sum(written.is_target)} of {len(written.steps)} steps are target steps{form}")
        for step, is_target in zip(written.steps, written.is_target, strict=True):
            lines.append(f"    {click.style('*', fg='red') if is_target else ' '} {_visible(step)}")
    lines.append(
        f"  along the unedited text: KL {row.kl:.4f} nats a token, loss {row.plain_loss:.4f} -> {row.steered_loss:.4f}"
    )
    return "\n".join(lines) + "\n"


def feature_card(card, own: str, other: str) -> str:
    """What a feature is, for a terminal: firings, tokens promoted, neighbours, contexts shaded by activation.

    Args:
        card: a `findings.contexts.FeatureCard`.
        own: the model the dictionary was learned from.
        other: the model beside it.
    """
    lines = [
        f"feature {card.feature}: fires at {card.target_firings} of {card.rows} rows in {own}, "
        f"{card.other_firings} in {other}; largest activation {card.largest:.3g}",
        f"  activations   {_sparkline(card.histogram)}  0 to {card.largest:.3g}",
        f"  promotes      {_weighted(card.promoted)}",
        f"  suppresses    {_weighted(card.suppressed)}",
        f"  like it       {_weighted(card.neighbours)}  (cosine of decoder rows)",
    ]
    for title, contexts in (("strongest, one a text", card.top), ("drawn at random", card.random)):
        if contexts:
            lines.append(f"\n  {title}: activation in {own}, then the same text with that in {other}")
        for context in contexts:
            shaded = [_shaded(context.tokens, values, card.largest) for values in (context.target, context.other)]
            lines += [f"  {context.activation:8.3g}  {shaded[0]}", f"  {'':8}  {shaded[1]}"]
    return "\n".join(lines) + "\n"


def _weighted(items) -> str:
    return ", ".join(f"{_visible(item.name).strip() or repr(item.name)} {item.weight:+.2f}" for item in items)


def _visible(text: str) -> str:
    """Line breaks and everything a terminal would obey, spelled out."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _sparkline(counts) -> str:
    largest = max(*counts, 1)
    return "".join(" ▁▂▃▄▅▆▇█"[min(8, -(-8 * count // largest))] for count in counts)


def _shaded(tokens, values, largest: float) -> str:
    """The text, each token on a ground as strong as its activation."""
    parts = []
    for token, value in zip(tokens, values, strict=True):
        if value <= 0:
            parts.append(_visible(token))
            continue
        strength = min(1.0, value / largest)
        ground = (255, round(235 - 135 * strength), round(200 - 170 * strength))
        parts.append(click.style(_visible(token), fg="black", bg=ground))
    return "".join(parts)
