"""A model made ready to read its streams fast: what a cache asks of it, and nothing past the last block asked.

For our decoder, at `float32` or `bfloat16`:

1. The weights of each block are cast and fused once: q, k and v are one product, gate and up another.
2. Padding is on the right, so attention is causal and needs no mask.
3. The stream itself, norms and softmax stay in float32; only what enters a product is cast.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.model.decoder import Block, Decoder, Rope
from sae_steer.model.language_model import LanguageModel
from sae_steer.settings import DecoderSettings
from sae_steer.world import World

_SHORT = 256
"""Positions up to which a text's whole attention pattern is made."""

Streams = dict[int, Float[Tensor, "_batch _pos _d_model"]]
"""{layer: resid_post}"""
StreamReader = Callable[[Int[Tensor, "_batch _pos"]], Streams]
"""Right-padded tokens -> the streams after the blocks it was made for, on the world's device."""


def stream_reader(model: LanguageModel, layers: tuple[int, ...], world: World) -> StreamReader:
    """Reads `model`'s streams after `layers` at the world's precision.

    Any model with `resid_posts` can be read; a `Decoder` by fused weights on the world's device.
    """
    if isinstance(model, Decoder):
        return _DecoderReader.of(model, layers, world)

    where = replace(world, device=model.device)

    def read(tokens: Int[Tensor, "_batch _pos"]) -> Streams:
        with torch.inference_mode(), where.compute():
            return {layer: resid.float() for layer, resid in model.resid_posts(tokens.to(model.device), layers).items()}

    return read


@dataclass(frozen=True)
class _FusedBlock:
    """A block's weights in the type of the products, which read them faster as [in, out]; gains stay float32."""

    attention_gain: Float[Tensor, " d_model"]
    W_qkv: Float[Tensor, "d_model qkv"]
    W_o: Float[Tensor, "heads_width d_model"]
    mlp_gain: Float[Tensor, " d_model"]
    W_gate_up: Float[Tensor, "d_model gate_up"]
    W_down: Float[Tensor, "d_mlp d_model"]

    @classmethod
    def of(cls, block: Block, device: torch.device, dtype: torch.dtype) -> "_FusedBlock":
        attention, mlp = block.self_attn, block.mlp

        def fused(*layers: torch.nn.Linear) -> Tensor:
            return torch.cat([layer.weight for layer in layers]).T.to(device, dtype).contiguous()

        return cls(
            block.input_layernorm.weight.to(device),
            fused(attention.q_proj, attention.k_proj, attention.v_proj),
            fused(attention.o_proj),
            block.post_attention_layernorm.weight.to(device),
            fused(mlp.gate_proj, mlp.up_proj),
            fused(mlp.down_proj),
        )


@dataclass(frozen=True)
class _DecoderReader:
    shape: DecoderSettings
    embedding: Float[Tensor, "vocab d_model"]
    blocks: tuple[_FusedBlock, ...]
    layers: tuple[int, ...]
    rotation: tuple[Float[Tensor, "n_ctx 1 2 half"], Float[Tensor, "n_ctx 1 2 half"]]
    """cos and sin of every position, sin with the sign of its half."""

    @classmethod
    def of(cls, model: Decoder, layers: tuple[int, ...], world: World) -> "_DecoderReader":
        for layer in layers:
            model.check_layer(layer)
        dtype, shape = world.autocast or torch.float32, model.shape
        rope = Rope.at(torch.arange(shape.n_ctx), shape)
        cos = torch.stack([rope.cos, rope.cos], 1)[:, None]
        sin = torch.stack([-rope.sin, rope.sin], 1)[:, None]
        return cls(
            shape,
            model.embed_tokens.weight.detach().to(world.device, torch.float32),
            tuple(_FusedBlock.of(block, world.device, dtype) for block in model.layers[: max(layers) + 1]),
            layers,
            (cos.to(world.device, dtype), sin.to(world.device, dtype)),
        )

    @torch.inference_mode()
    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Streams:
        resid = F.embedding(tokens.to(self.embedding.device), self.embedding)
        found = {}
        for layer, block in enumerate(self.blocks):
            resid = resid + self._attention(self._norm(resid, block.attention_gain, block), block)
            gate, up = (self._norm(resid, block.mlp_gain, block) @ block.W_gate_up).chunk(2, dim=-1)
            resid += F.silu(gate).mul_(up) @ block.W_down
            if layer in self.layers:
                found[layer] = resid
        return found

    def _norm(self, resid: Tensor, gain: Tensor, block: _FusedBlock) -> Tensor:
        return F.rms_norm(resid, gain.shape, gain, self.shape.eps).to(block.W_qkv.dtype)

    def _attention(self, x: Float[Tensor, "batch pos d_model"], block: _FusedBlock) -> Float[Tensor, "batch pos _"]:
        shape, (batch, pos, _) = self.shape, x.shape
        kv = shape.n_kv_heads
        rotated = shape.n_heads + kv
        heads = (x @ block.W_qkv).view(batch, pos, rotated + kv, shape.d_head)
        halves = heads[:, :, :rotated].unflatten(-1, (2, -1))
        cos, sin = (table[:pos] for table in self.rotation)
        qk = torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2)
        q, k, v = (
            part.transpose(1, 2)
            for part in (qk[:, :, : shape.n_heads], qk[:, :, shape.n_heads :], heads[:, :, rotated:])
        )
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and kv == shape.n_heads and pos <= _SHORT:
            mixed = _short_attention(q, k, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv != shape.n_heads)
        return mixed.transpose(1, 2).flatten(-2) @ block.W_o


def _short_attention(q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch head pos d_head"]:
    """Causal attention of short texts by plain products: on two cores two thirds of the fused kernel's time."""
    batch, heads, pos, d_head = q.shape
    q, k, v = (part.contiguous().flatten(0, 1) for part in (q, k, v))
    later = torch.full((pos, pos), -torch.inf).triu(1)
    weights = (q @ k.transpose(1, 2)).float().mul_(d_head**-0.5).add_(later).softmax(-1)
    return (weights.to(v.dtype) @ v).unflatten(0, (batch, heads))
