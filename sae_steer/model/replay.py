"""Edits of the residual stream: by hook while a model runs, and by replaying only what an edit can change.

An edit after block L at position t leaves every layer up to L and every position before t as they were. So

1. the clean pass runs once and keeps the stream after L and the keys and values of the blocks above;
2. an edit of one position costs one token through the blocks above, which reads the stored keys and
   values of earlier positions and its own new ones (`read_single`), many edits of a text at a time;
3. edits of many positions together cost the blocks above alone (`read_joint`).

The only module that edits activations.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.errors import InputError, NotDeliveredError
from sae_steer.model.decoder import Decoder, Heads, KVHeads, Storing

Edit = Callable[[Tensor], Tensor]
"""Residual rows [*rows, d_model] -> the rows that replace them."""


@contextmanager
def edited(model: Decoder, site: str, edit: Edit, *, after: tuple[int, ...] | None = None) -> Iterator[Decoder]:
    """While it lasts, `edit` is applied at `site` (`blocks.2.hook_resid_post`), at the positions of the
    tokens `after` or at all; gone afterwards, exception or not. An edit that met no position is an error.
    """
    layer = _layer_of(site, model)
    wanted = None if after is None else torch.tensor(after, device=model.device)
    seen: dict[str, Tensor] = {}
    met = 0

    def remember(module, inputs):
        seen["tokens"] = inputs[0]

    def apply(module, inputs, resid):
        nonlocal met
        if wanted is None:
            met += resid.shape[0] * resid.shape[1]
            return edit(resid)
        assert seen["tokens"].shape == resid.shape[:2], "run the model from its tokens: the edit follows some of them"
        here = torch.isin(seen["tokens"], wanted)
        met += int(here.sum())
        changed = resid.clone()
        changed[here] = edit(resid[here])
        return changed

    hooks = [model.embed_tokens.register_forward_pre_hook(remember), model.layers[layer].register_forward_hook(apply)]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
    if not met:
        raise NotDeliveredError(
            f"the edit at {site} met no position; run the model inside the `with`, on texts with onsets"
        )


@dataclass(frozen=True)
class Stored:
    """Attention of single replayed tokens: to the stored keys before their position, and to themselves."""

    clean: Storing
    positions: Int[Tensor, "batch edit"]

    def __call__(self, layer: int, q: Heads, k: KVHeads, v: KVHeads) -> Heads:
        """What each replayed token reads; tokens of one text do not see each other."""
        groups = q.shape[1] // k.shape[1]
        keys, values, k, v = (
            tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor
            for tensor in (self.clean.keys[layer], self.clean.values[layer], k, v)
        )
        scale = q.shape[-1] ** -0.5
        past = (q @ keys.mT) * scale
        places = torch.arange(keys.shape[2], device=q.device)
        past = past.masked_fill((places >= self.positions[..., None])[:, None], float("-inf"))
        own = (q * k).sum(-1, keepdim=True) * scale
        weights = torch.cat([past, own], dim=-1).softmax(-1)
        return weights[..., :-1] @ values + weights[..., -1:] * v


@dataclass(frozen=True)
class CleanPass:
    """What one batch of texts leaves behind unedited: all that replay after block `layer` reads."""

    model: Decoder
    layer: int
    resid: Float[Tensor, "batch pos d_model"]
    """The stream after block `layer`."""
    stored: Storing

    @classmethod
    @torch.no_grad()
    def of(cls, model: Decoder, tokens: Int[Tensor, "batch pos"], layer: int) -> "CleanPass":
        """Run `tokens` (right-padded) once."""
        model.check_layer(layer)
        resid = model.run(model.embed(tokens), stop=layer + 1)
        stored = Storing()
        model.run(resid, start=layer + 1, attend=stored)
        return cls(model, layer, resid, stored)

    def at(self, positions: Int[Tensor, "batch edit"]) -> Float[Tensor, "batch edit d_model"]:
        """The clean stream at the positions."""
        return self.resid.gather(1, positions[..., None].expand(-1, -1, self.resid.shape[-1]))

    @torch.no_grad()
    def read_single(
        self, positions: Int[Tensor, "batch edit"], resid: Float[Tensor, "copy batch edit d_model"]
    ) -> Float[Tensor, "copy batch edit vocab"]:
        """Next-token logits at each position, had the stream there alone been `resid`.

        `copy` runs over edits of the same positions (doses, directions).
        """
        places = positions.repeat(1, len(resid))
        tokens = rearrange(resid, "copy batch edit d_model -> batch (copy edit) d_model")
        carried = self.model.run(tokens, start=self.layer + 1, attend=Stored(self.stored, places), positions=places)
        carried = rearrange(carried, "batch (copy edit) d_model -> copy batch edit d_model", copy=len(resid))
        return self.model.unembed(carried)

    @torch.no_grad()
    def read_joint(
        self,
        positions: Int[Tensor, "batch edit"],
        resid: Float[Tensor, "copy batch edit d_model"],
        real: Bool[Tensor, "batch edit"],
    ) -> Float[Tensor, "copy batch edit vocab"]:
        """Next-token logits at every position, had all `real` ones of a text been `resid` together.

        `copy` runs over edits of the same texts (doses, directions).
        """
        copies = resid.shape[0]
        rows, slots = real.nonzero(as_tuple=True)
        whole = self.resid.repeat(copies, 1, 1, 1)
        whole[:, rows, positions[rows, slots]] = resid[:, rows, slots]
        carried = self.model.run(rearrange(whole, "copy batch ... -> (copy batch) ..."), start=self.layer + 1)
        index = positions[..., None].expand(-1, -1, resid.shape[-1])
        picked = carried.gather(1, index.repeat(copies, 1, 1))
        return rearrange(self.model.unembed(picked), "(copy batch) ... -> copy batch ...", copy=copies)


def _layer_of(site: str, model: Decoder) -> int:
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", site)
    if not found:
        raise InputError(f"cannot edit at {site!r}; sites are 'blocks.N.hook_resid_post'")
    model.check_layer(int(found[1]))
    return int(found[1])
