"""A model's blocks with taps, and one run of its own forward from a stream put in to a stream taken out.

`transformers` drives: embedding, positions, masks, caches, the loop over the blocks, norm and head are the model's
own code. While it runs, each block stands inside a `Place`, which

1. skips the block where the run starts above it, and puts the stream in where the run starts;
2. shows the stream after the block to the hooks of `out`, which may replace it;
3. ends the run once the stream asked for is there.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_steer.model.hf.writers import Term, heard

MASK = "attention_mask"

Stream = Float[Tensor, "_batch _pos _d_model"]


class Done(Exception):
    """The stream asked for is there: nothing above it is computed."""


@dataclass
class Run:
    """What one forward is asked to do, and what it leaves."""

    start: int = 0
    """The first block to run."""
    stop: int | None = None
    """The block before which to end; None gives logits."""
    resid: Stream | None = None
    """The input of block `start`; None begins with the tokens."""
    keep: frozenset[int] = frozenset()
    """Blocks after which the stream is kept."""
    masks: dict[int, Tensor] | None = None
    """What each block is given for its attention mask instead of the model's own."""
    streams: dict[int, Stream] = field(default_factory=dict)
    seen_masks: dict[int, Tensor | None] = field(default_factory=dict)
    """The model's own masks, by block."""
    last: Stream | None = None
    """The stream where the run ended."""


class Place(nn.Module):
    """A block as it stands in the stream."""

    def __init__(self, block: nn.Module, layer: int, extras: tuple[Any, ...] | None):
        super().__init__()
        self.block, self.layer = block, layer
        self.extras = extras
        """What the block puts out beside the stream, in a tuple; None where it puts out the stream alone."""
        self.into, self.out = nn.Identity(), nn.Identity()
        self.terms: tuple[Term, ...] = ()
        """What attention and MLP add, once somebody asked."""
        self.parameters_named = names_of(block)
        self.run = Run()

    def __getattr__(self, name: str) -> Any:
        """Whatever the model asks of a block, the block answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block puts out, as the run has it."""
        run = self.run
        if self.layer < run.start:
            return self._as_block(run.resid)
        given = {**dict(zip(self.parameters_named, args, strict=False)), **kwargs}
        first = self.parameters_named[0] if args else next(iter(kwargs))
        stream = run.resid if self.layer == run.start and run.resid is not None else given[first]
        run.seen_masks[self.layer] = given.get(MASK)
        changed = {first: self.into(stream)}
        if run.masks is not None and MASK in given:
            changed[MASK] = run.masks[self.layer]
        args = tuple(changed.pop(name, value) for name, value in zip(self.parameters_named, args, strict=False))
        with heard(self.terms):
            output = self.block(*args, **{**kwargs, **changed})
        stream, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        stream = self.out(stream).to(stream.dtype)
        if self.layer in run.keep:
            run.streams[self.layer] = stream
        run.last = stream
        if self.layer + 1 == run.stop:
            raise Done
        return stream if rest is None else (stream, *rest)

    def _as_block(self, stream: Stream) -> Any:
        return stream if self.extras is None else (stream, *self.extras)


def names_of(block: nn.Module) -> tuple[str, ...]:
    """What a block calls its arguments, in order; of those it takes without a name, the number."""
    names = [
        name
        for name, parameter in inspect.signature(block.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return (*names, *(f"argument {number}" for number in range(len(names), 16)))


def takes_mask(block: nn.Module) -> bool:
    """Whether a block's mask can be replaced: it is an argument with a name, or one among others by name."""
    parameters = inspect.signature(block.forward).parameters
    return MASK in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@contextmanager
def in_place(blocks: nn.ModuleList, places: tuple[Place, ...], run: Run) -> Iterator[None]:
    """The model's blocks stand in their places while it lasts."""
    for number, place in enumerate(places):
        place.run = run
        blocks._modules[str(number)] = place
    try:
        yield
    finally:
        for number, place in enumerate(places):
            blocks._modules[str(number)] = place.block
            place.run = Run()


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as every attention of `transformers` adds it to its scores."""
    hidden = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)
