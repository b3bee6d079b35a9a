"""Texts padded, run, and their real rows kept: what reads streams of many texts does it here."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.model.batching import length_batches, pad
from sae_steer.model.language_model import LanguageModel

TOKENS_PER_BATCH = 4_096
Key = TypeVar("Key", bound=Hashable)
Ids = Int[np.ndarray, " _pos"] | Sequence[int]


@dataclass(frozen=True)
class Padded:
    """Some of many texts, padded on the right."""

    members: tuple[int, ...]
    """Which of the texts."""
    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]

    @classmethod
    def of(cls, texts: Sequence[Ids], members: Sequence[int] | None = None) -> "Padded":
        """The `members` of `texts`, by default all, as one batch."""
        chosen = tuple(range(len(texts)) if members is None else members)
        rows = [[int(token) for token in texts[i]] for i in chosen]
        return cls(chosen, pad(rows, 0), torch.tensor([len(row) for row in rows]))

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Where there is a token and no padding."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def placed(self, flags: Sequence[np.ndarray]) -> Bool[Tensor, "batch pos"]:
        """Flags of every text, one a token, where its tokens stand here."""
        found = torch.zeros(self.tokens.shape, dtype=torch.bool)
        for row, i in enumerate(self.members):
            found[row, : len(flags[i])] = torch.from_numpy(flags[i].astype(bool))
        return found


def padded(texts: Sequence[Ids], tokens_per_batch: int | None = None) -> Iterator[Padded]:
    """The texts in batches of like length, about so many tokens each (default: `TOKENS_PER_BATCH`)."""
    for members in length_batches([len(text) for text in texts], tokens_per_batch or TOKENS_PER_BATCH):
        yield Padded.of(texts, members)


def real_rows(
    texts: Sequence[Ids],
    run: Callable[[Int[Tensor, "_batch _pos"]], dict[Key, Tensor]],
    *,
    each: Callable[[Callable[[list[int]], None], list[list[int]]], object] = lambda work, items: list(map(work, items)),
    tokens_per_batch: int | None = None,
) -> dict[Key, np.ndarray]:
    """{key: [row, ...]} over the tokens of the texts, in their order, of what `run` makes of padded batches.

    Args:
        run: padded tokens -> {key: [batch, pos, ...]}.
        each: does the batches; by default one after another.
    """
    starts = np.cumsum([0, *(len(text) for text in texts)])
    rows: dict[Key, np.ndarray] = {}

    def place(members: list[int]) -> None:
        batch = Padded.of(texts, members)
        for key, values in run(batch.tokens).items():
            part = values.cpu().numpy()
            if key not in rows:
                rows.setdefault(key, np.empty((starts[-1], *part.shape[2:]), part.dtype))
            for row, i in enumerate(batch.members):
                rows[key][starts[i] : starts[i + 1]] = part[row, : len(texts[i])]

    each(place, list(length_batches([len(text) for text in texts], tokens_per_batch or TOKENS_PER_BATCH)))
    return rows


@torch.no_grad()
def real_streams(
    model: LanguageModel, texts: Sequence[Ids], layers: tuple[int, ...]
) -> dict[int, Float[np.ndarray, "row d_model"]]:
    """{layer: the stream after it, float32} at every token of the texts, in their order."""

    def run(tokens: Int[Tensor, "batch pos"]) -> dict[int, Tensor]:
        streams = model.resid_posts(tokens.to(model.device), layers)
        return {layer: resid.float() for layer, resid in streams.items()}

    return real_rows(texts, run)
