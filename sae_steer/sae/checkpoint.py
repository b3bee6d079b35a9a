"""Dictionaries part-way through their training, and how they survive a kill.

1. A checkpoint is one safetensors file: weights, thresholds, Adam's moments, the dead-feature counters, the step,
   and the identity of the run (settings, rows, precision).
2. It is written beside and renamed, so a kill leaves the last whole one.
3. A Ctrl-C or SIGTERM waits for the end of its step: a state is never caught between two parameters.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sae_steer.errors import NotFiniteError, StaleError
from sae_steer.files import read_tensors, write_tensors
from sae_steer.sae.learner import Learner
from sae_steer.sae.schedule import Plateau

_WATCH = ("best", "best_step", "average", "end")


@dataclass
class TrainingState:
    """Everything a step reads and changes; `step` is also the data's cursor, and every random draw is a function of
    the settings and the step, so there is no generator to keep."""

    learners: list[Learner]
    plateau: Plateau
    step: int = 0

    def save(self, path: Path, identity: dict) -> None:
        """Write the checkpoint; weights that are not finite are refused and the last good one stays."""
        named = [(i, learner.tensors()) for i, learner in enumerate(self.learners)]
        tensors = {f"{i}.{name}": kept for i, mine in named for name, kept in mine.items()}
        if not all(bool(kept.isfinite().all()) for kept in tensors.values()):
            raise NotFiniteError(f"the weights are not finite at step {self.step}; {last_good(path)}")
        for i, learner in enumerate(self.learners):
            if learner.dead is not None:
                tensors[f"{i}.dead"] = learner.dead
        watch = {name: getattr(self.plateau, name) for name in _WATCH}
        write_tensors(path, tensors, {"step": self.step, "plateau": watch, "identity": identity})

    @torch.no_grad()
    def load(self, path: Path, identity: dict) -> None:
        """Continue from a checkpoint of the same run; one of another run is refused."""
        tensors, facts = read_tensors(path)
        if facts["identity"] != identity:
            other = ", ".join(name for name in identity if facts["identity"].get(name) != identity[name])
            raise StaleError(f"{path} is of a run with other {other}; delete it or name another output")
        self.step = facts["step"]
        for name, value in facts["plateau"].items():
            setattr(self.plateau, name, value)
        for i, learner in enumerate(self.learners):
            for name, kept in learner.tensors().items():
                kept.copy_(tensors[f"{i}.{name}"])
            dead = tensors.get(f"{i}.dead")
            learner.dead = None if dead is None else dead.to(learner.W_enc.device)
            learner.updates = self.step
            learner.refresh()


def last_good(path: Path | None) -> str:
    """Where a failed run can go on from, as the end of an error line."""
    if path is None or not path.exists():
        return "there is no checkpoint before it; lower the learning rate and start again"
    step = read_tensors(path)[1]["step"]
    return f"the last good checkpoint is step {step} in {path}; delete it and lower the learning rate"


@contextmanager
def interrupts_held() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a yes from the yielded question; the second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(signum: int, frame: object) -> None:
        asked.set()
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield asked.is_set
    finally:
        restore()
