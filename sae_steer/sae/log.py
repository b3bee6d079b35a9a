"""What a training run tells its caller, and the file that keeps it: one JSON object a line."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from sae_steer.files import open_to_append


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """How training stands after a step."""

    name: str = ""
    """Which dictionary, where several are learned together."""
    step: int
    steps: int
    """Steps of the whole run."""
    loss: float
    fve: float
    """1 - ||x - x_hat||^2 / E||x - mean||^2 on this batch, the expectation over all training rows."""
    dead: float | None
    """Share of features silent for longer than the settings allow; None while too few rows were read for any to be."""
    lr: float


@runtime_checkable
class Log(Protocol):
    """The command line draws a progress bar, tests keep a list."""

    def step(self, facts: StepFacts) -> None:
        """Called every few steps, after the step."""

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint has been written."""

    def done(self, step: int) -> None:
        """All steps are done."""


class Quiet:
    """The `Log` that says nothing."""

    def step(self, facts: StepFacts) -> None:
        """Nothing."""

    def checkpoint(self, step: int, path: Path) -> None:
        """Nothing."""

    def done(self, step: int) -> None:
        """Nothing."""


class JsonLines:
    """Appends every event to a file; a resumed run repeats the steps since its last checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        open_to_append(path).close()

    def step(self, facts: StepFacts) -> None:
        """A line of the step's facts."""
        self._write("step", asdict(facts))

    def checkpoint(self, step: int, path: Path) -> None:
        """A line with the checkpoint's name."""
        self._write("checkpoint", {"step": step, "path": path.name})

    def done(self, step: int) -> None:
        """The last line."""
        self._write("done", {"step": step})

    def _write(self, event: str, facts: dict) -> None:
        # the clock has a key of its own, so that the rest of two equal runs compares equal
        timing = {"seconds": round(time.perf_counter() - self._started, 3)}
        with open_to_append(self.path) as file:
            file.write(json.dumps({"event": event, **facts, "timing": timing}) + "\n")


def jsonl_log(path: Path) -> JsonLines:
    """The log that appends to `path`."""
    return JsonLines(path)


class Together:
    """Several logs told the same."""

    def __init__(self, *logs: Log) -> None:
        self.logs = logs

    def step(self, facts: StepFacts) -> None:
        """To each log."""
        for log in self.logs:
            log.step(facts)

    def checkpoint(self, step: int, path: Path) -> None:
        """To each log."""
        for log in self.logs:
            log.checkpoint(step, path)

    def done(self, step: int) -> None:
        """To each log."""
        for log in self.logs:
            log.done(step)
