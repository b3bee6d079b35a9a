"""Texts of different lengths as padded batches: in order of length, about so many tokens each."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from sae_steer.randomness import Stream, generator

Tokens = Int[Tensor, "_batch _pos"]
"""One batch; batches differ in both axes."""


def length_batches(lengths: list[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of texts of like length, about `tokens_per_batch` tokens a batch with padding counted."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def bucket(
    texts: list[list[int]], *, tokens_per_batch: int, pad_id: int, seed: int, chunk: int = 2_048
) -> tuple[Tokens, ...]:
    """Batches of about `tokens_per_batch`, of texts of like length, in an order fixed by `seed`.

    Texts are sorted by length within chunks of the given order, so that batches mix what the corpus mixes.
    """
    batches: list[Tokens] = []
    for start in range(0, len(texts), chunk):
        rows: list[list[int]] = []
        for text in sorted(texts[start : start + chunk], key=len):
            if rows and len(text) * (len(rows) + 1) > tokens_per_batch:
                batches.append(pad(rows, pad_id))
                rows = []
            rows.append(text)
        batches.append(pad(rows, pad_id))
    order = torch.randperm(len(batches), generator=generator(seed, Stream.BATCH_ORDER)).tolist()
    return tuple(batches[i] for i in order)


def pad(rows: list[list[int]], pad_id: int) -> Tokens:
    """Right-padded to the longest."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
