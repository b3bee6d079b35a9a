"""The command that puts the verdict itself to the test."""

from pathlib import Path

import click

from sae_steer.cli.group import main
from sae_steer.cli.options import (
    COUNT,
    SOME,
    force_option,
    out_option,
    pair_option,
    precision_option,
    say_precision,
    seed_option,
)
from sae_steer.settings import SelftestSettings


@main.command()
@pair_option
@click.option("--studies", default=SelftestSettings.studies, type=COUNT, help="Of each kind of planted pair.")
@click.option("--kind", "kinds", multiple=True, help="A kind of study to run; repeat for more.  [default: all]")
@click.option(
    "--level-studies", default=SelftestSettings.level_studies, type=SOME, help="On the level of the rank test."
)
@click.option("--summary", is_flag=True, help="Only sum up the studies that are finished.")
@precision_option
@out_option
@seed_option
@force_option
def selftest(pair, studies, kinds, level_studies, summary, precision, out, seed, force) -> None:
    """How often the verdict is right: whole studies of planted pairs whose truth is measured; resumes after a kill.

    \b
    Examples:
        sae-steer selftest
        sae-steer selftest --summary
    """
    from sae_steer.cache import begun_precision
    from sae_steer.pair.model_pair import load_pair
    from sae_steer.selftest.run import selftest, summarise
    from sae_steer.terminal import Bar
    from sae_steer.world import World

    loaded = load_pair(pair)
    folder = out or Path("runs", loaded.name, "selftest")
    settings = SelftestSettings(studies=studies, level_studies=level_studies, seed=seed)
    if summary:
        click.echo(summarise(loaded, folder, settings=settings))
    else:
        world = World.local(precision=precision, device="cpu")
        say_precision(world, begun_precision(folder / "cache"), f"the cache in {folder / 'cache'}")
        made = selftest(
            loaded, folder, settings=settings, kinds=kinds, precision=precision, force=force, on_step=Bar("selftest")
        )  # fmt: skip
        click.echo(made)
