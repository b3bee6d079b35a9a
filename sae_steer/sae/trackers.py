"""TensorBoard and Weights & Biases as `Log`s, for those who ask for them; neither is imported before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_steer.errors import InputError, SteerError
from sae_steer.sae.log import Log, StepFacts

TRACKERS = ("tensorboard", "wandb")
PROJECT = "sae_steer"
"""Of the runs at Weights & Biases."""
_FIGURES = ("loss", "fve", "dead", "lr")


def tracker(kind: str, folder: Path, name: str, settings: Mapping[str, Any]) -> Log:
    """The log of that kind (one of `TRACKERS`), whose files lie in `folder`; its package must be installed.

    Args:
        name: of the run.
        settings: what it is told with.
    """
    if kind not in TRACKERS:
        raise InputError(f"no log {kind!r}; choose one of {', '.join(TRACKERS)}")
    return TensorBoard(folder / kind) if kind == "tensorboard" else WeightsAndBiases(folder, name, settings)


class TensorBoard:
    """Scalars in an event file; a resumed run hides what the one before told of later steps."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _lacking("tensorboard") from error
        self.folder, self._writer = folder, None
        self._open = SummaryWriter

    def step(self, facts: StepFacts) -> None:
        """The step's figures."""
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=facts.step)
        for name, value in _figures(facts).items():
            self._writer.add_scalar(name, value, facts.step)

    def checkpoint(self, step: int, path: Path) -> None:
        """What was told so far is on disk, whatever happens next."""
        if self._writer is not None:
            self._writer.flush()

    def done(self, step: int) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of the project `sae_steer`; WANDB_MODE, WANDB_ENTITY and their like mean what they always do."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _lacking("wandb") from error
        folder.mkdir(parents=True, exist_ok=True)
        terminal = wandb.Settings(console="off")  # the bar and the paths on stdout are left alone
        try:
            self._run = wandb.init(
                project=PROJECT, name=name, group=name, dir=str(folder), config=dict(settings), settings=terminal
            )
        except wandb.Error as error:
            raise SteerError(f"wandb does not start: {error}; run `wandb login`, or set WANDB_MODE=offline") from error

    def step(self, facts: StepFacts) -> None:
        """The step's figures."""
        self._run.log(_figures(facts), step=facts.step)

    def checkpoint(self, step: int, path: Path) -> None:
        """Nothing: what was told is stored at once."""

    def done(self, step: int) -> None:
        """End the run."""
        self._run.finish()


def _lacking(package: str) -> InputError:
    return InputError(f"--log {package} needs the package {package}, which is not here; pip install {package}")


def _figures(facts: StepFacts) -> dict[str, float]:
    """By tag: the dictionary's name before each, where several are learned together."""
    known = {name: value for name in _FIGURES if (value := getattr(facts, name)) is not None}
    return {f"{facts.name}/{name}" if facts.name else name: value for name, value in known.items()}
