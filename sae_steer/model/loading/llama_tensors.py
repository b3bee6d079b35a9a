"""The tensors of a Llama's safetensors under the decoder's names, and what `transformers` does to them on reading.

1. Every weight takes the type that the config states, whatever the file holds.
2. Where the config ties head and embedding, a stored head that is no copy of the embedding is kept, untied; one without
   an embedding beside it stands for both.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from sae_steer.errors import InputError
from sae_steer.model.loading.llama import PREFIX

HEAD, TABLE = "lm_head.weight", "embed_tokens.weight"
IGNORED = ("rotary_emb.inv_freq",)
"""Buffers some writers store; positions are computed here."""


@dataclass(frozen=True)
class LlamaTensors:
    """A Llama's weights, and how they differ from what its config leads one to expect."""

    tensors: dict[str, torch.Tensor]
    """By the decoder's names; whatever has no place there keeps its own."""
    tied: bool
    notes: tuple[str, ...] = ()
    """For people, a line each."""


def match_llama(stored: dict[str, torch.Tensor], file: Path, *, tied: bool, dtype: torch.dtype | None) -> LlamaTensors:
    """The tensors of `file` as `transformers` reads them.

    Args:
        tied, dtype: what the config says.
    """
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(IGNORED):
            continue
        short = name.removeprefix(PREFIX)
        if short in ours:
            raise InputError(f"{file} holds {short} with and without {PREFIX!r} before it; save the model again")
        ours[short] = tensor
    _refuse_quantised(ours, file)
    ours, notes = _cast(ours, file, dtype)
    if tied and HEAD in ours:
        if TABLE not in ours:
            ours[TABLE] = ours.pop(HEAD)
        elif torch.equal(ours[HEAD], ours[TABLE]):
            del ours[HEAD]
        else:
            line = f"{file} holds a head of its own, though its config ties it to the embedding: the head is kept"
            return LlamaTensors(ours, False, (*notes, line))
    return LlamaTensors(ours, tied, notes)


def _refuse_quantised(tensors: dict[str, torch.Tensor], file: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize < 2:
            raise InputError(f"{file} holds quantised tensors ({name}); save the model dequantised")


def _cast(
    tensors: dict[str, torch.Tensor], file: Path, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors in the type stated, and a line where that rounded any; without one the file's must be one."""
    types = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if dtype is None:
        if len(types) > 1:
            names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
            raise InputError(f"{file} holds weights in {names}, and its config states no dtype; write one there")
        return tensors, ()
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if types <= {dtype}:
        return cast, ()
    if all(torch.equal(cast[name].double(), tensor.double()) for name, tensor in tensors.items()):
        return cast, ()
    return cast, (f"{file} holds more digits than the {str(dtype).removeprefix('torch.')} its config states: rounded",)
