"""Looking at a feature: what it fires on, and text written with and without it."""

import json

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import SOME, dictionary_options, on_own_device, open_dictionary
from sae_steer.settings import ContextSettings


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
