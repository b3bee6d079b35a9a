"""Sampled continuations with stored keys and values; finished rows leave the batch.

Each row reads its own noise, one uniform number a step, so a row's text does not depend on when others end.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.model.language_model import LanguageModel


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
    state = model.continuation(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    rows = torch.arange(len(prompts), device=model.device)  # the prompt of each row still in the batch
    going = lengths < max_tokens
    while going.any():
        noise = _noise(generators, len(prompts)).to(model.device)[rows]
        drawn = _draw(state.logits / temperature, noise)
        for row, token, goes in zip(rows.tolist(), drawn.tolist(), going.tolist(), strict=True):
            if goes:
                texts[row].append(token)
        lengths = lengths + going.long()
        going &= (drawn != end_id) & (lengths < max_tokens)
        if not going.any():
            break
        if going.sum() <= 0.75 * len(rows):  # copying keys and values at every ending would cost more than it saves
            kept = going.nonzero()[:, 0]
            rows, drawn, going, lengths = rows[kept], drawn[kept], going[kept], lengths[kept]
            state.keep(kept)
        state.append(drawn, going)
    return texts


def _noise(generators: Sequence[torch.Generator], rows: int) -> Float[Tensor, " batch"]:
    return torch.cat([torch.rand(rows // len(generators), generator=part) for part in generators])


def _draw(logits: Float[Tensor, "batch vocab"], noise: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The token whose stretch of the cumulative distribution holds the noise."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, noise.double()[:, None] * cumulative[:, -1:], right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )
