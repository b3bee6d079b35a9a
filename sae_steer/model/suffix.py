"""What runs above an edit: the later blocks, on stored keys and values of what the edit leaves as it was.

One class for the native decoder, whose attention is an argument, and one for models that TransformerLens runs,
which takes its key-value caches. Both answer alike.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.model.decoder import Decoder, Heads, KVHeads, Rope, Storing
from sae_steer.model.language_model import LanguageModel

_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""torch's own attention on a CPU, which also returns the logsumexp; a name that no release of torch promises."""


def gather(
    stream: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch edit"]
) -> Float[Tensor, "batch edit d_model"]:
    """A stream at some positions of each text."""
    return stream.gather(1, positions[..., None].expand(-1, -1, stream.shape[-1]))


@dataclass(frozen=True)
class DecoderSuffix:
    """Of the native decoder: a replayed token attends by `Stored` or `StoredPrefix`."""

    model: Decoder
    start: int
    stored: Storing

    def joint(
        self, resid: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch edit"]
    ) -> Float[Tensor, "batch edit d_model"]:
        """Whole texts carried through the blocks, and read at `positions` alone.

        The last block gives keys and values of every token, and runs where it is read.
        """
        last = self.model.shape.n_layers - 1
        if self.start > last:
            return gather(resid, positions)
        resid = self.model.run(resid[:, : int(positions.max()) + 1], start=self.start, stop=last)
        edited, block = Storing(), self.model.layers[last]
        rope = Rope.at(torch.arange(resid.shape[1], device=resid.device), self.model.shape)
        edited.keys[last], edited.values[last] = block.self_attn.keys_and_values(block.input_layernorm(resid), rope)
        return self.model.run(
            gather(resid, positions), start=last, attend=Stored(edited, positions), positions=positions
        )

    def many(self, row: int, position: int, resid: Float[Tensor, " copy d_model"]) -> Float[Tensor, " copy d_model"]:
        """Replacements of one token of one text, each carried through the blocks alone."""
        attend, place = StoredPrefix(self.stored, row, position), torch.tensor([[position]], device=resid.device)
        return self.model.run(resid[None], start=self.start, attend=attend, positions=place)[0]

    def single(
        self, positions: Int[Tensor, "batch edit"], resid: Float[Tensor, "copy batch edit d_model"]
    ) -> Float[Tensor, "copy batch edit d_model"]:
        """Replacements of tokens at every position of a batch of texts, each carried alone."""
        places = positions.repeat(1, len(resid))
        tokens = rearrange(resid, "copy batch edit d_model -> batch (copy edit) d_model")
        attend = Stored(self.stored, places)
        carried = self.model.run(tokens, start=self.start, attend=attend, positions=places)
        return rearrange(carried, "batch (copy edit) d_model -> copy batch edit d_model", copy=len(resid))


@dataclass(frozen=True)
class LensSuffix:
    """Of a TransformerLens model: a replayed token is the next one after a key-value cache of its prefix.

    Whatever the attention is (rotary, ALiBi, grouped queries), TransformerLens computes it.
    """

    model: LanguageModel
    start: int
    stored: dict[int, tuple[Tensor, Tensor]]
    """By layer: keys, as TransformerLens caches them, and values, [batch, pos, kv_head, d_head]."""

    def joint(
        self, resid: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch edit"]
    ) -> Float[Tensor, "batch edit d_model"]:
        """Whole texts carried through the blocks, and read at `positions` alone."""
        return gather(self.model.run(resid, start=self.start), positions)

    def many(self, row: int, position: int, resid: Float[Tensor, " copy d_model"]) -> Float[Tensor, " copy d_model"]:
        """Replacements of one token of one text, each carried through the blocks alone."""
        prefix = {
            layer: tuple(part[row, :position].expand(len(resid), -1, -1, -1) for part in pair)
            for layer, pair in self.stored.items()
        }
        return self.model.run(resid[:, None], start=self.start, past=prefix)[:, 0]

    def single(
        self, positions: Int[Tensor, "batch edit"], resid: Float[Tensor, "copy batch edit d_model"]
    ) -> Float[Tensor, "copy batch edit d_model"]:
        """Replacements of tokens at every position of a batch of texts, each carried alone."""
        carried = torch.empty_like(resid)
        for row, places in enumerate(positions.tolist()):
            for slot, position in enumerate(places):
                carried[:, row, slot] = self.many(row, position, resid[:, row, slot])
        return carried


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
        hidden = torch.finfo(q.dtype).min  # of a first token all are: with -inf its gradient would be NaN
        mask = torch.zeros(ahead.shape, dtype=q.dtype, device=q.device).masked_fill_(ahead, hidden)
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
    if _FUSED and q.device.type == "cpu" and not q.requires_grad:  # a third of the time; no gradient of the logsumexp
        return _FUSED(q, keys, values, 0.0, False, attn_mask=mask)
    scores = (q @ keys.mT) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    weight = scores.logsumexp(-1)
    return (scores - weight[..., None]).exp() @ values, weight
