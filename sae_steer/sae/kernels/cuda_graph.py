"""Work on a GPU as one CUDA graph: small kernels end before the next is launched, and a graph launches all at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Made = TypeVar("Made")


@dataclass(frozen=True)
class Captured(Generic[Made]):
    """A function of a batch as a CUDA graph: a hundred launches become one."""

    rows: Float[Tensor, "row d_in"]
    """Where each replay finds its batch."""
    graph: torch.cuda.CUDAGraph
    result: Made
    """Where each replay leaves its result."""

    @classmethod
    def of(cls, function: Callable[[Tensor], Made], x: Float[Tensor, "row d_in"]) -> "Captured[Made]":
        """`function` must not wait for the device, and read what changes where it lies."""
        with torch.cuda.device(x.device):
            rows, aside, graph = x.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries set themselves up in their first calls
                function(rows)
            torch.cuda.current_stream().wait_stream(aside)
            # thread_local: another thread reads the next batch meanwhile
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                result = function(rows)
        return cls(rows, graph, result)

    def __call__(self, x: Float[Tensor, "row d_in"]) -> Made:
        """The function of `x`, until the next call."""
        with torch.cuda.device(x.device):
            self.rows.copy_(x)
            self.graph.replay()
        return self.result
