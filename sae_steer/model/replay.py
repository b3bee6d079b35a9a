"""Edits of the residual stream: by hook while a model runs, and by replaying only what an edit can change.

An edit after block L at position t leaves every layer up to L and every position before t as they were. So

1. the clean pass runs once and keeps the stream after L and the keys and values of the blocks above;
2. an edit of one position costs one token through the blocks above, which reads the stored keys and
   values of earlier positions and its own new ones: few edits at every position of a batch of texts
   (`read_single`), or hundreds at one position, on exactly the keys it reads (`read_many`);
3. edits of many positions together cost the blocks above alone (`read_joint`).

`whole_pass` is what replay must equal: the full model with the edit in it, by hook.

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
Readout = Callable[[Tensor], Tensor]
"""Next-token logits [row, vocab] -> what is kept of them [row, *read]."""
ROWS = 512
"""Copies of one token carried at once: fewer lose time to calls, many more leave the processor's cache."""


def as_they_are(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
    """The logits themselves."""
    return logits


@contextmanager
def edited(
    model: Decoder,
    site: str,
    edit: Edit,
    *,
    after: tuple[int, ...] | None = None,
    at: Bool[Tensor, "batch pos"] | None = None,
) -> Iterator[Decoder]:
    """While it lasts, `edit` is applied at `site` (`blocks.2.hook_resid_post`), at the positions of the
    tokens `after`, at those marked in `at`, or at all; gone afterwards, exception or not. An edit that met no
    position is an error.
    """
    layer = _layer_of(site, model)
    wanted = None if after is None else torch.tensor(after, device=model.device)
    seen: dict[str, Tensor] = {}
    met = 0

    def remember(module, inputs):
        seen["tokens"] = inputs[0]

    def apply(module, inputs, resid):
        nonlocal met
        if wanted is None and at is None:
            met += resid.shape[0] * resid.shape[1]
            return edit(resid)
        assert seen["tokens"].shape == resid.shape[:2], "run the model from its tokens: the edit follows some of them"
        here = torch.isin(seen["tokens"], wanted) if at is None else at
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


@torch.no_grad()
def whole_pass(
    model: Decoder, tokens: Int[Tensor, "batch pos"], layer: int, edit: Edit, at: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos vocab"]]:
    """The stream that the part above block `layer` receives, and the logits, of a full pass with `edit` at `at`."""
    received: list[Tensor] = []
    above = [*model.layers, model.norm][layer + 1]
    hook = above.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    try:
        with edited(model, f"blocks.{layer}.hook_resid_post", edit, at=at):
            logits = model(tokens)
    finally:
        hook.remove()
    return received[0], logits


@dataclass(frozen=True)
class Stored:
    """Attention of single replayed tokens: to the stored keys before their position, and to themselves."""

    clean: Storing
    positions: Int[Tensor, "batch query"]

    def __call__(self, layer: int, q: Heads, k: KVHeads, v: KVHeads) -> Heads:
        """What each replayed token reads; tokens of one text do not see each other."""
        past = (stored[layer] for stored in (self.clean.keys, self.clean.values))
        places = torch.arange(self.clean.keys[layer].shape[2], device=q.device)
        ahead = (places >= self.positions[..., None])[:, None]
        mask = torch.zeros(ahead.shape, dtype=q.dtype, device=q.device).masked_fill_(ahead, float("-inf"))
        return _with_itself(q, k, v, *past, mask, alone=(self.positions == 0)[:, None])


@dataclass(frozen=True)
class StoredPrefix:
    """Attention of many replacements of one token: no mask, for all of them read the same stored keys."""

    clean: Storing
    row: int
    position: int

    def __call__(self, layer: int, q: Heads, k: KVHeads, v: KVHeads) -> Heads:
        """What each replacement reads: the keys before the position, and its own."""
        here = slice(self.row, self.row + 1)
        past = (stored[layer][here, :, : self.position] for stored in (self.clean.keys, self.clean.values))
        if self.position == 0:
            return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return _with_itself(q, k, v, *past)


def _with_itself(
    q: Heads,
    k: KVHeads,
    v: KVHeads,
    keys: Float[Tensor, "batch kv_head past d_head"],
    values: Float[Tensor, "batch kv_head past d_head"],
    mask: Float[Tensor, "batch 1 query past"] | None = None,
    alone: Bool[Tensor, "batch 1 query"] | None = None,
) -> Heads:
    """Softmax attention of each token over a past that all share and over itself.

    It is what the past alone would give, and the token's own value, mixed by their weights: the share of the
    token itself is sigmoid(own score - logsumexp(past scores)). So no key is appended to the past.

    Args:
        alone: tokens all of whose past is masked.
    """
    groups = q.shape[1] // k.shape[1]
    k, v, keys, values = (
        tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor for tensor in (k, v, keys, values)
    )
    own = (q * k).sum(-1) * q.shape[-1] ** -0.5
    past, weight = _attend(q, keys, values, mask)
    share = torch.sigmoid(own - weight)
    if alone is not None:
        share = share.masked_fill(alone, 1.0)
        past = past.masked_fill(alone[..., None], 0.0)
    return torch.lerp(past, v, share[..., None])


def _attend(
    q: Heads,
    keys: Float[Tensor, "batch head past d_head"],
    values: Float[Tensor, "batch head past d_head"],
    mask: Float[Tensor, "batch 1 query past"] | None,
) -> tuple[Heads, Float[Tensor, "batch head query"]]:
    """What the queries read, and the logsumexp of their scores."""
    if q.device.type == "cpu":  # never forms the weights: a third of the time of the lines below
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, False, attn_mask=mask)
    scores = (q @ keys.mT) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    weight = scores.logsumexp(-1)
    return (scores - weight[..., None]).exp() @ values, weight


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
        return gather(self.resid, positions)

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
    def read_many(
        self, row: int, position: int, resid: Float[Tensor, " copy d_model"], readout: Readout = as_they_are
    ) -> Float[Tensor, " copy *read"]:
        """What `readout` makes of the next-token logits at one position of one text, had the stream there alone
        been each of `resid`.
        """
        attend, place = StoredPrefix(self.stored, row, position), torch.tensor([[position]], device=resid.device)
        found = []
        for part in resid.split(ROWS):
            carried = self.model.run(part[None], start=self.layer + 1, attend=attend, positions=place)
            found.append(readout(self.model.unembed(carried[0])))
        return torch.cat(found)

    @torch.no_grad()
    def read_joint(
        self,
        at: Bool[Tensor, "batch pos"],
        resid: Float[Tensor, "copy place d_model"],
        positions: Int[Tensor, "batch edit"],
    ) -> Float[Tensor, "copy batch edit vocab"]:
        """Next-token logits at `positions`, had the stream at all places marked in `at` been `resid` together.

        `copy` runs over edits of the same texts (doses, directions); places are those of `at` in row order.
        """
        copies = resid.shape[0]
        whole = self.resid.repeat(copies, 1, 1, 1)
        whole[:, at] = resid
        carried = self.model.run(rearrange(whole, "copy batch ... -> (copy batch) ..."), start=self.layer + 1)
        picked = gather(carried, positions.repeat(copies, 1))
        return rearrange(self.model.unembed(picked), "(copy batch) ... -> copy batch ...", copy=copies)


def gather(
    stream: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch edit"]
) -> Float[Tensor, "batch edit d_model"]:
    """A stream at some positions of each text."""
    return stream.gather(1, positions[..., None].expand(-1, -1, stream.shape[-1]))


def _layer_of(site: str, model: Decoder) -> int:
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", site)
    if not found:
        raise InputError(f"cannot edit at {site!r}; sites are 'blocks.N.hook_resid_post'")
    model.check_layer(int(found[1]))
    return int(found[1])
