"""Sampled continuations with stored keys and values; finished rows leave the batch.

Each row reads its own noise, one uniform number a step, so a row's text does not depend on when others end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int,
    max_tokens: int,
    temperature: float,
    generator: torch.Generator | Sequence[torch.Generator],
) -> list[list[int]]:
    """Each prompt continued, without truncation of the distribution, to `end_id` or `max_tokens` in all.

    Returns the continuations, `end_id` included where it was reached; a prompt of `max_tokens` gets none.
    Edits in force (`replay.edited`) apply.

    Args:
        generator: of the noise. With several the prompts fall into as many equal parts, each with the noise of its
            own, so that a part's texts are the same whatever runs beside it; two runs with the same generators
            share their noise (common random numbers, by inverse transform).
    """
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    assert len(prompts) % len(generators) == 0, "every generator needs an equal part of the prompts"
    texts: list[list[int]] = [[] for _ in prompts]
    if not texts:
        return texts
    if not isinstance(model, Decoder):
        return _sample_rereading(model, prompts, generators, end_id, max_tokens, temperature)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    stored = Storing()
    resid = model.run(model.embed(pad([list(prompt) for prompt in prompts], 0).to(model.device)), attend=stored)
    logits = model.unembed(resid[torch.arange(len(prompts), device=model.device), lengths - 1])
    cache = Growing(stored.keys, stored.values, lengths)
    rows = torch.arange(len(prompts), device=model.device)  # the prompt of each row still in the batch
    going = lengths < max_tokens
    while going.any():
        noise = _noise(generators, len(prompts)).to(model.device)[rows]
        drawn = _draw(logits / temperature, noise)
        for row, token, goes in zip(rows.tolist(), drawn.tolist(), going.tolist(), strict=True):
            if goes:
                texts[row].append(token)
        going &= (drawn != end_id) & (cache.positions + 1 < max_tokens)
        if not going.any():
            break
        if going.sum() <= 0.75 * len(rows):  # copying keys and values at every ending would cost more than it saves
            kept = going.nonzero()[:, 0]
            rows, drawn, going, cache = rows[kept], drawn[kept], going[kept], cache.keep(kept)
        resid = model.run(model.embed(drawn[:, None]), attend=cache, positions=cache.positions[:, None])
        logits = model.unembed(resid[:, 0])
        cache.positions = cache.positions + going.long()
    return texts


def _sample_rereading(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
    end_id: int,
    max_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """`sample` of a model that stores no keys and values here: each step reads the texts from their beginning."""
    texts = [list(prompt) for prompt in prompts]
    going = [row for row, text in enumerate(texts) if len(text) < max_tokens]
    while going:
        noise = _noise(generators, len(prompts))[going].to(model.device)
        lengths = torch.tensor([len(texts[row]) for row in going], device=model.device)
        logits = model(pad([texts[row] for row in going], 0).to(model.device))
        last = logits[torch.arange(len(going), device=model.device), lengths - 1]
        drawn = _draw(last / temperature, noise).tolist()
        for row, token in zip(going, drawn, strict=True):
            texts[row].append(token)
        going = [row for row in going if texts[row][-1] != end_id and len(texts[row]) < max_tokens]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _noise(generators: Sequence[torch.Generator], rows: int) -> Float[Tensor, " batch"]:
    return torch.cat([torch.rand(rows // len(generators), generator=part) for part in generators])


def _draw(logits: Float[Tensor, "batch vocab"], noise: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The token whose stretch of the cumulative distribution holds the noise."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, noise.double()[:, None] * cumulative[:, -1:], right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )
