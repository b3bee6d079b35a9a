"""Replay on any model of `transformers`: an edited token comes after the stored keys and values of its prefix.

Two ways, which a model's loading tries in this order (`replays_masked`):

1. masked: the edited tokens of a text follow it in one pass, each at its own position, and a mask lets each see the
   keys before its position and its own;
2. by prefix: a pass for every position, its copies as a batch after a cache cut there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from sae_steer.model.hf.places import Run, additive
from sae_steer.model.suffix import gather

if TYPE_CHECKING:
    from sae_steer.model.hf.model import HFModel

TOGETHER = 256
"""Edited tokens of one text carried at once: more pay for scores among themselves that the mask hides."""
KeysAndValues = tuple[Float[Tensor, "_batch _head _pos _d_k"], Float[Tensor, "_batch _head _pos _d_v"]]


class Recording(DynamicCache):
    """A cache that keeps what each block hands it, as it was handed: whole, whatever window the model has."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: dict[int, KeysAndValues] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Note, then store."""
        self.handed[layer_idx] = (key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def suffix_of(model: "HFModel", resid: Float[Tensor, "batch pos d_model"], start: int) -> "HFSuffix":
    """The blocks of `model` from `start` on, run once on the clean stream below them."""
    if start >= model.shape.n_layers:
        return HFSuffix(model, start, {}, {}, resid.shape[1])
    run, cache = Run(start=start, stop=model.shape.n_layers, resid=resid.to(model.dtype)), Recording()
    model.go(run, model.no_tokens(resid), past_key_values=cache, use_cache=True)
    visible = {layer: _visible(mask, resid.shape[1], resid.device) for layer, mask in run.seen_masks.items()}
    return HFSuffix(model, start, cache.handed, visible, resid.shape[1])


@dataclass(frozen=True)
class HFSuffix:
    """The blocks from `start` on, with the keys and values of a clean pass."""

    model: "HFModel"
    start: int
    stored: dict[int, KeysAndValues]
    visible: dict[int, Bool[Tensor, "any pos pos"]]
    """By block: which keys each token sees, as the model's own mask has it."""
    length: int

    def joint(
        self, resid: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch edit"]
    ) -> Float[Tensor, "batch edit d_model"]:
        """Whole texts carried through the blocks by a full pass, and read at `positions` alone."""
        return gather(self.model.run(resid, start=self.start), positions)

    def many(self, row: int, position: int, resid: Float[Tensor, " copy d_model"]) -> Float[Tensor, " copy d_model"]:
        """Replacements of one token of one text, each carried through the blocks alone."""
        if self.start >= self.model.shape.n_layers:
            return resid
        if not self.model.replays_masked:
            return self._after_prefix(row, position, resid)
        parts = resid.split(TOGETHER)
        return torch.cat([self._masked(part[None], _at(row, position, part), row)[0] for part in parts])

    def single(
        self, positions: Int[Tensor, "batch edit"], resid: Float[Tensor, "copy batch edit d_model"]
    ) -> Float[Tensor, "copy batch edit d_model"]:
        """Replacements of tokens at every position of a batch of texts, each carried alone."""
        if self.start >= self.model.shape.n_layers:
            return resid
        if not self.model.replays_masked:
            return self._one_by_one(positions, resid)
        copies = max(TOGETHER // positions.shape[1], 1)
        return torch.cat([self._copies(positions, part) for part in resid.split(copies)])

    def _copies(self, positions: Tensor, resid: Tensor) -> Tensor:
        tokens = rearrange(resid, "copy batch edit d_model -> batch (copy edit) d_model")
        carried = self._masked(tokens, positions.repeat(1, len(resid)))
        return rearrange(carried, "batch (copy edit) d_model -> copy batch edit d_model", copy=len(resid))

    def _masked(
        self,
        resid: Float[Tensor, "batch edit d_model"],
        positions: Int[Tensor, "batch edit"],
        row: int | None = None,
    ) -> Float[Tensor, "batch edit d_model"]:
        """Edited tokens of each text (or of text `row` alone) in one pass after the whole of it."""
        rows = slice(None) if row is None else slice(row, row + 1)
        end = int(positions.max())
        masks = {layer: self._mask(visible, positions, rows, end) for layer, visible in self.visible.items()}
        stored = {layer: tuple(part[rows, :, :end] for part in pair) for layer, pair in self.stored.items()}
        run = Run(start=self.start, stop=self.model.shape.n_layers, resid=resid.to(self.model.dtype), masks=masks)
        self._go(run, stored, end, positions)
        return run.last

    def _mask(self, visible: Tensor, positions: Tensor, rows: slice, end: int) -> Float[Tensor, "batch 1 edit key"]:
        """Each edited token sees what its position sees, but for the token it replaces, and itself."""
        seen = visible if len(visible) == 1 else visible[rows]
        seen = seen.expand(len(positions), -1, -1)[:, :, :end]
        past = seen.gather(1, positions[..., None].expand(-1, -1, end))
        past = past & (torch.arange(end, device=past.device) < positions[..., None])
        own = torch.eye(positions.shape[1], dtype=torch.bool, device=past.device).expand(len(positions), -1, -1)
        return additive(torch.cat([past, own], dim=-1)[:, None], self.model.dtype)

    def _after_prefix(self, row: int, position: int, resid: Tensor) -> Tensor:
        prefix = {
            layer: tuple(part[row, :, :position].expand(len(resid), -1, -1, -1) for part in pair)
            for layer, pair in self.stored.items()
        }
        run = Run(start=self.start, stop=self.model.shape.n_layers, resid=resid[:, None].to(self.model.dtype))
        self._go(run, prefix, position, torch.full((len(resid), 1), position, device=resid.device))
        return run.last[:, 0]

    def _one_by_one(self, positions: Tensor, resid: Tensor) -> Tensor:
        carried = torch.empty_like(resid)
        for row, places in enumerate(positions.tolist()):
            for slot, position in enumerate(places):
                carried[:, row, slot] = self._after_prefix(row, position, resid[:, row, slot])
        return carried

    def _go(self, run: Run, stored: dict[int, KeysAndValues], length: int, positions: Tensor) -> None:
        cache = filled(stored, self.start, length, run.resid)
        placed = {"position_ids": positions} if self.model.takes_positions else {}
        self.model.go(run, self.model.no_tokens(run.resid), past_key_values=cache, use_cache=True, **placed)


def filled(stored: dict[int, KeysAndValues], start: int, length: int, resid: Tensor) -> DynamicCache:
    """A cache of `length` tokens with `stored` in it; below `start`, of that length and of no content."""
    cache = DynamicCache()
    if not length:
        return cache
    nothing = resid.new_zeros(len(resid), 1, length, 1)
    for layer in range(start):
        cache.update(nothing, nothing, layer)
    for layer, (keys, values) in sorted(stored.items()):
        cache.update(keys, values, layer)
    return cache


def _visible(mask: Any, length: int, device: torch.device) -> Bool[Tensor, "any pos pos"]:
    """Which keys each token sees; no mask is causal attention."""
    if mask is None:
        return torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return torch.zeros(1, length, length, dtype=torch.bool, device=device)  # found out when the model is checked
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[:, 0, :, :length]


def _at(row: int, position: int, resid: Tensor) -> Int[Tensor, "1 copy"]:
    return torch.full((1, len(resid)), position, device=resid.device)


def masked_or_by_prefix(model: "HFModel") -> Iterator[bool]:
    """The ways to replay, the fast one first."""
    from sae_steer.model.hf.places import takes_mask

    if model.takes_positions and all(takes_mask(block) for block in model.layers):
        yield True
    yield False
