"""Sampled continuations with stored keys and values; finished rows leave the batch.

Each row reads its own noise, one uniform number a step, so a row's text does not depend on when others end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.model.decoder import Decoder, Heads, KVHeads, Storing
from sae_steer.model.training import pad


@dataclass
class Growing:
    """Attention of one new token a row to all of that row's tokens so far, whose keys and values are kept."""

    keys: dict[int, Float[Tensor, "batch kv_head pos d_head"]]
    values: dict[int, Float[Tensor, "batch kv_head pos d_head"]]
    positions: Int[Tensor, " batch"]

    def __call__(self, layer: int, q: Heads, k: KVHeads, v: KVHeads) -> Heads:
        """Store the new token at its position, then attend to every position up to it."""
        rows = torch.arange(len(q), device=q.device)
        self.keys[layer][rows, :, self.positions] = k[:, :, 0]
        self.values[layer][rows, :, self.positions] = v[:, :, 0]
        end = int(self.positions.max()) + 1
        seen = torch.arange(end, device=q.device) <= self.positions[:, None, None, None]
        return torch.nn.functional.scaled_dot_product_attention(
            q,
            self.keys[layer][:, :, :end],
            self.values[layer][:, :, :end],
            attn_mask=seen,
            enable_gqa=k.shape[1] != q.shape[1],
        )

    def keep(self, rows: Int[Tensor, " kept"]) -> "Growing":
        """The state of some of the rows."""
        return Growing(
            {layer: keys[rows] for layer, keys in self.keys.items()},
            {layer: values[rows] for layer, values in self.values.items()},
            self.positions[rows],
        )


@torch.no_grad()
def sample(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int,
    max_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Each prompt continued, without truncation of the distribution, to `end_id` or `max_tokens` in all.

    Returns the continuations, `end_id` included where it was reached. Edits in force (`replay.edited`) apply.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    tokens = pad([list(prompt) for prompt in prompts], 0).to(model.device)
    logits, cache = _prefill(model, tokens, lengths, max_tokens)
    texts: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=model.device)
    while True:
        noise = torch.rand(len(prompts), generator=generator).to(model.device)[alive]
        drawn = _draw(logits / temperature, noise)
        for row, token in zip(alive.tolist(), drawn.tolist(), strict=True):
            texts[row].append(token)
        going = ((drawn != end_id) & (cache.positions + 1 < max_tokens)).nonzero()[:, 0]
        if not len(going):
            return texts
        if len(going) < len(alive):
            alive, drawn, cache = alive[going], drawn[going], cache.keep(going)
        resid = model.run(model.embed(drawn[:, None]), attend=cache, positions=cache.positions[:, None])
        logits = model.unembed(resid[:, 0])
        cache.positions = cache.positions + 1


def _prefill(model: Decoder, tokens: Int[Tensor, "batch pos"], lengths: Int[Tensor, " batch"], room: int):
    """The next-token logits of each prompt, and its keys and values in buffers of `room` positions."""
    stored = Storing()
    resid = model.run(model.embed(tokens), attend=stored)
    last = resid[torch.arange(len(tokens), device=model.device), lengths - 1]

    def roomy(found: dict[int, Tensor]) -> dict[int, Tensor]:
        return {
            layer: torch.nn.functional.pad(tensor, (0, 0, 0, max(0, room - tensor.shape[2])))
            for layer, tensor in found.items()
        }

    return model.unembed(last), Growing(roomy(stored.keys), roomy(stored.values), lengths)


def _draw(logits: Float[Tensor, "batch vocab"], noise: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The token whose stretch of the cumulative distribution holds the noise."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, noise.double()[:, None] * cumulative[:, -1:], right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )
