"""Texts continued token by token: the logits that follow each, and one more token read of every row at a time.

`DecoderContinuation` keeps the keys and values of what was read; `Rereading` reads each text from its beginning, for
models whose caches know no rows of different lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.model.batching import pad
from sae_steer.model.decoder import Decoder, Heads, KVHeads, Storing
from sae_steer.model.language_model import LanguageModel

ROOM = 64
"""Positions by which buffers of keys and values grow."""


@dataclass
class Growing:
    """Attention of one new token a row to all of that row's tokens so far, whose keys and values are kept."""

    keys: dict[int, Float[Tensor, "batch kv_head _pos d_head"]]
    values: dict[int, Float[Tensor, "batch kv_head _pos d_head"]]
    positions: Int[Tensor, " batch"]
    """Where each row's next token stands."""

    def __call__(self, layer: int, q: Heads, k: KVHeads, v: KVHeads) -> Heads:
        """Store the new token at its position, then attend to every position up to it."""
        rows, end = torch.arange(len(q), device=q.device), int(self.positions.max()) + 1
        for buffers, new in ((self.keys, k), (self.values, v)):
            if end > buffers[layer].shape[2]:
                buffers[layer] = F.pad(buffers[layer], (0, 0, 0, ROOM))
            buffers[layer][rows, :, self.positions] = new[:, :, 0]
        seen = torch.arange(end, device=q.device) <= self.positions[:, None, None, None]
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=k.shape[1] != q.shape[1])

    def keep(self, rows: Int[Tensor, " kept"]) -> "Growing":
        """The state of some of the rows."""
        return Growing(
            {layer: keys[rows] for layer, keys in self.keys.items()},
            {layer: values[rows] for layer, values in self.values.items()},
            self.positions[rows],
        )


class DecoderContinuation:
    """Of the native decoder."""

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]]):
        self.model = model
        lengths, stored = torch.tensor([len(prompt) for prompt in prompts], device=model.device), Storing()
        tokens = pad([list(prompt) for prompt in prompts], 0).to(model.device)
        resid = model.run(model.embed(tokens), attend=stored)
        self.logits: Float[Tensor, "row vocab"] = model.unembed(
            resid[torch.arange(len(prompts), device=model.device), lengths - 1]
        )
        self.cache = Growing(stored.keys, stored.values, lengths)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with some of the rows."""
        self.cache = self.cache.keep(rows)

    def append(self, tokens: Int[Tensor, " row"], going: Bool[Tensor, " row"]) -> None:
        """Read one more token of each row; those not `going` stay where they are."""
        positions = self.cache.positions
        resid = self.model.run(self.model.embed(tokens[:, None]), attend=self.cache, positions=positions[:, None])
        self.logits = self.model.unembed(resid[:, 0])
        self.cache.positions = positions + going.long()


class Rereading:
    """Of any model, from its whole texts."""

    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]):
        self.model, self.texts = model, [list(prompt) for prompt in prompts]
        self.logits: Float[Tensor, "row vocab"] = self._read()

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with some of the rows."""
        self.texts = [self.texts[row] for row in rows.tolist()]

    def append(self, tokens: Int[Tensor, " row"], going: Bool[Tensor, " row"]) -> None:
        """Read the texts with one more token each; those not `going` stay as they are."""
        for text, token, goes in zip(self.texts, tokens.tolist(), going.tolist(), strict=True):
            text += [token] if goes else []
        self.logits = self._read()

    def _read(self) -> Tensor:
        logits = self.model(pad(self.texts, 0).to(self.model.device))
        last = torch.tensor([len(text) - 1 for text in self.texts], device=logits.device)
        return logits[torch.arange(len(last), device=logits.device), last]
