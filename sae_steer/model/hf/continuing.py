"""Texts continued by a model of `transformers` with its own caches: rows of one length go together, none is padded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from sae_steer.model.hf.places import Run

if TYPE_CHECKING:
    from sae_steer.model.hf.model import HFModel


@dataclass
class _Group:
    """Rows at the same position, and their cache."""

    rows: Int[Tensor, " some"]
    cache: DynamicCache


class HFContinuation:
    """One group for each length of prompt; it takes a pass a token."""

    def __init__(self, model: "HFModel", prompts: Sequence[Sequence[int]]):
        self.model = model
        self.logits: Float[Tensor, "row vocab"] = model.W_U.new_zeros(len(prompts), model.shape.d_vocab)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        self.groups = []
        for length in lengths.unique():
            group = _Group((lengths == length).nonzero()[:, 0], DynamicCache())
            self.groups.append(group)
            tokens = [list(prompts[row]) for row in group.rows.tolist()]
            self._read(group, torch.tensor(tokens, device=model.device))

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with some of the rows."""
        self.logits, groups = self.logits[rows], []
        for group in self.groups:
            kept, places = torch.isin(group.rows, rows), torch.searchsorted(rows, group.rows)
            if kept.any():
                group.cache.batch_select_indices(kept.nonzero()[:, 0])
                groups.append(_Group(places[kept], group.cache))
        self.groups = groups

    def append(self, tokens: Int[Tensor, " row"], going: Bool[Tensor, " row"]) -> None:
        """Read one more token of each row; what follows in those not `going` is nobody's."""
        for group in self.groups:
            if going[group.rows].any():
                self._read(group, tokens[group.rows][:, None])

    def _read(self, group: _Group, tokens: Int[Tensor, "some pos"]) -> None:
        output = self.model.go(Run(), tokens, past_key_values=group.cache, use_cache=True)
        self.logits[group.rows] = output.logits[:, -1]
