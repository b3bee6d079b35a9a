"""Training a pair of models."""

from pathlib import Path

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import COUNT, Knob, Place, force_option, precision_option, say_precision, seed_option
from sae_steer.settings import PRESETS, PairTrainingSettings


@main.command("train-pair")
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), default=PairTrainingSettings.preset, help="Shape of both models."
)
@click.option(
    "--init", type=click.Choice(["shared", "separate"]), default=PairTrainingSettings.init,
    help="shared: both continue one model trained on an equal mix; separate: two random starts.",
)  # fmt: skip
@click.option(
    "--twin/--no-twin", default=PairTrainingSettings.twin, show_default="no-twin",
    help="Also train a twin of the target: the same text in another order.",
)  # fmt: skip
@click.option("--tokens", default=PairTrainingSettings.tokens, type=COUNT, help="Training tokens a model.")
@click.option(
    "--lr", type=Knob(PairTrainingSettings, "lr"), default=PairTrainingSettings.lr, help="Peak learning rate."
)
@precision_option
@click.option("--out", type=Place(), help="The pair's folder.  [default: pairs/PRESET]")
@seed_option
@force_option
def train_pair(preset, init, twin, tokens, lr, precision, out, seed, force) -> None:
    """Train two models that differ in their training text alone; resumes after a kill.

    \b
    Example:
        sae-steer train-pair --preset small --init shared
    """
    from sae_steer.pair.training import begun_precision, train_pair
    from sae_steer.terminal import Bar
    from sae_steer.world import World

    settings = PairTrainingSettings(preset=preset, init=init, twin=twin, tokens=tokens, lr=lr, seed=seed)
    folder = out or Path("pairs", preset)
    world = World.local(precision=precision)
    say_precision(world, None if force else begun_precision(folder), f"the pair in {folder}")
    train_pair(folder, settings, world=world, force=force, on_step=Bar("train-pair"))
    click.echo(folder)
