"""The command group: what a user can mend becomes one line on stderr and exit code 1."""

import sys

import click

from sae_steer.errors import SteerError, visible
from sae_steer.torchrun import processes

MANY_PROCESSES = ("cache", "train-sae")
"""Commands that torchrun may start several times; they use `world.joined`."""


class SteerGroup(click.Group):
    """Turns what a user can mend into a one-line message and exit code 1."""

    def main(self, *args, **kwargs):
        """Run the group; what a terminal's alphabet lacks is spelled out, not an error after hours of work."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        """The command, refused where torchrun started several processes and it knows but one."""
        name, command, rest = super().resolve_command(ctx, args)
        if processes() > 1 and name not in MANY_PROCESSES:
            raise click.ClickException(
                f"{name} runs in one process; start it without torchrun (with it: {', '.join(MANY_PROCESSES)})"
            )
        return name, command, rest

    def invoke(self, ctx: click.Context):
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SteerError as error:
            raise click.ClickException(visible(" ".join(str(error).split()))) from error
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
