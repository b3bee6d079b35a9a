"""A dictionary part-way through its training, and how it survives a kill.

1. A checkpoint is one safetensors file: weights, Adam's moments, the dead-feature counter, the step,
   and the identity of the run (settings, rows, precision).
2. It is written beside and renamed, so a kill leaves the last whole one.
3. A Ctrl-C waits for the end of its step: a state is never caught between two parameters.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sae_steer.errors import NotFiniteError, StaleError
from sae_steer.runtime import read_tensors, write_tensors
from sae_steer.sae.architectures import TopKSAE

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """Everything a step reads and changes; `step` is also the data's cursor."""

    sae: TopKSAE
    optimiser: torch.optim.Adam
    silent_rows: Int[Tensor, " d_sae"]
    """Rows read since each feature last fired."""
    step: int = 0

    def save(self, path: Path, identity: dict) -> None:
        """Write the checkpoint; weights that are not finite are refused and the last good one stays."""
        if not all(bool(weight.isfinite().all()) for weight in self.sae.parameters()):
            raise NotFiniteError(f"the weights are not finite at step {self.step}; {last_good(path)}")
        tensors = {"silent_rows": self.silent_rows}
        for name, weight in self.sae.named_parameters():
            tensors[f"weight.{name}"] = weight.detach()
            for moment, value in self.optimiser.state[weight].items():
                tensors[f"{moment}.{name}"] = value
        write_tensors(path, tensors, {"step": self.step, "identity": identity})

    @torch.no_grad()
    def load(self, path: Path, identity: dict) -> None:
        """Continue from a checkpoint of the same run; one of another run is refused."""
        tensors, facts = read_tensors(path)
        if facts["identity"] != identity:
            other = ", ".join(name for name in identity if facts["identity"].get(name) != identity[name])
            raise StaleError(f"{path} is of a run with other {other}; delete it or name another output")
        self.step = facts["step"]
        self.silent_rows.copy_(tensors["silent_rows"])
        for name, weight in self.sae.named_parameters():
            weight.copy_(tensors[f"weight.{name}"])
            self.optimiser.state[weight] = {
                moment: tensors[f"{moment}.{name}"].to(weight.device) for moment in _MOMENTS
            }


def last_good(path: Path | None) -> str:
    """Where a failed run can go on from, as the end of an error line."""
    if path is None or not path.exists():
        return "there is no checkpoint before it; lower the learning rate and start again"
    step = read_tensors(path)[1]["step"]
    return f"the last good checkpoint is step {step} in {path}; delete it and lower the learning rate"


@contextmanager
def interrupts_held() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a yes from the yielded question; the second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
