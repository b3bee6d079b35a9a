"""The parts of a causal language model, found by what they do in one forward pass, never by the names of architectures.

1. The blocks are the list of `num_hidden_layers` modules through which one stream passes, each taking what the one
   before it put out.
2. The final norm is what takes the stream after the last block, unless that is the unembedding itself.
3. Embedding and unembedding are what the model says they are.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sae_steer.errors import InputError


@dataclass(frozen=True)
class Parts:
    """What was found."""

    path: str
    """Where the blocks stand, as in `model.layers`."""
    blocks: nn.ModuleList
    extras: tuple[tuple[Any, ...] | None, ...]
    """By block: what it puts out beside the stream; None where it puts out the stream alone."""
    embedding: nn.Module
    head: nn.Module
    norm: nn.Module | None
    width: int
    """Of the stream."""


@dataclass(frozen=True)
class _Call:
    """One call of a module."""

    module: nn.Module
    taken: Tensor | None
    """Its first argument."""
    put_out: Any

    @property
    def stream(self) -> Any:
        return self.put_out[0] if isinstance(self.put_out, tuple) else self.put_out


def find_parts(model: nn.Module, tokens: Tensor) -> Parts:
    """The parts of `model`, which reads `tokens` once for it; a model without them is an `InputError`."""
    name, depth = type(model).__name__, getattr(model.config.get_text_config(), "num_hidden_layers", None)
    takes = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or depth is None or not {"input_ids", "past_key_values"} <= set(takes):
        raise InputError(
            f"a {name} is no causal language model with a stack of blocks that keep keys and values (input_ids, "
            "past_key_values, num_hidden_layers); it cannot be a model of a pair"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for part, what in ((embedding, "input"), (head, "output")):
        if getattr(getattr(part, "weight", None), "ndim", 0) != 2:
            raise InputError(f"a {name} has no {what} embedding with one row a token; it cannot be a model of a pair")
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    with _calls(model) as calls, torch.no_grad():
        model(tokens, use_cache=False)
    for path, blocks in lists:
        passed = [next((call for call in calls if call.module is block), None) for block in blocks]
        if _is_stream(passed):
            extras = tuple(call.put_out[1:] if isinstance(call.put_out, tuple) else None for call in passed)
            norm = _reader(calls, passed[-1], head)
            return Parts(path, blocks, extras, embedding, head, norm, passed[-1].stream.shape[-1])
    looked_at = ", ".join(path for path, _ in lists) or f"none has {depth} entries"
    raise InputError(
        f"a {name} has no list of {depth} blocks through which one stream passes (lists looked at: {looked_at}); it "
        "cannot be a model of a pair"
    )


def _is_stream(passed: list[_Call | None]) -> bool:
    """Whether every block was called, and took what the one before it put out."""
    if not all(call is not None and isinstance(call.stream, Tensor) and call.stream.ndim == 3 for call in passed):
        return False
    return all(
        below.stream.shape == above.stream.shape and above.taken is not None and torch.equal(below.stream, above.taken)
        for below, above in pairwise(passed)
    )


def _reader(calls: list[_Call], last: _Call, head: nn.Module) -> nn.Module | None:
    """The module with weights that takes the stream after the last block; None if that is the head."""
    for call in calls[calls.index(last) + 1 :]:
        took = call.taken is not None and call.taken.shape == last.stream.shape and torch.equal(call.taken, last.stream)
        if took and any(True for _ in call.module.parameters()):
            return None if call.module is head else call.module
    return None


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[_Call]]:
    """The calls of all modules while it lasts, in the order in which they end."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        first = next(iter(inspect.signature(module.forward).parameters), "")
        taken = args[0] if args else kwargs.get(first)
        calls.append(_Call(module, taken if isinstance(taken, Tensor) else None, output))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
