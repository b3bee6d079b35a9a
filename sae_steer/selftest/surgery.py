"""Edits of a decoder's weights that leave its function as it was: spare room to plant in, and another basis.

A widened decoder has spare dimensions in its stream (lanes), spare heads and spare MLP neurons. Nothing writes a
lane and nothing reads one until something is planted, so a plant meets no trace of what the model learned.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.model.decoder import Block, Decoder


@torch.no_grad()
def widened(model: Decoder, *, lanes: int, heads: int, neurons: int) -> Decoder:
    """The same function with a wider stream, more heads and larger MLPs, everything new at zero; untied.

    RMSNorm divides by the width, so its gains and epsilon take the ratio of the widths.
    """
    old = model.shape
    assert old.n_heads == old.n_kv_heads, "a spare head needs keys of its own"
    ratio = old.d_model / (old.d_model + lanes)
    shape = replace(
        old,
        d_model=old.d_model + lanes,
        n_heads=old.n_heads + heads,
        n_kv_heads=old.n_kv_heads + heads,
        d_mlp=old.d_mlp + neurons,
        eps=old.eps * ratio,
        tied=False,
    )
    wide = Decoder(shape).requires_grad_(False).eval()
    weights = {**model.state_dict(), "lm_head.weight": model.W_U}
    for name, parameter in wide.named_parameters():
        parameter.fill_(ratio**0.5 if parameter.ndim == 1 else 0.0)
        parameter[tuple(slice(size) for size in weights[name].shape)] = weights[name] * (
            ratio**0.5 if parameter.ndim == 1 else 1.0
        )
    return wide


@torch.no_grad()
def rotated(model: Decoder, rotation: Float[Tensor, "d_model d_model"]) -> Decoder:
    """The same function with every stream h as h @ rotation (orthogonal): the norms' gains are folded first."""
    turned, turn = copy.deepcopy(model), rotation.double()
    for gain, readers in _readers(turned):
        for reader in readers:
            reader.copy_((reader.double() * gain.double()) @ turn)
        gain.fill_(1.0)
    for writer in _writers(turned):
        writer.copy_(turn.T @ writer.double())
    turned.embed_tokens.weight.copy_(turned.embed_tokens.weight.double() @ turn)
    return turned


@torch.no_grad()
def plant_neuron(
    block: Block,
    index: int,
    *,
    gate: Mapping[int, float] | Tensor,
    up: Mapping[int, float] | Tensor,
    down: Mapping[int, float] | Tensor,
) -> None:
    """Set one neuron of a block's MLP: it adds silu(gate . n) * (up . n) * down, n the normed stream.

    Args:
        gate, up, down: a vector of the stream, or {lane: weight}, zero elsewhere.
    """
    mlp = block.mlp
    mlp.gate_proj.weight[index] = _vector(gate, mlp.gate_proj.weight[index])
    mlp.up_proj.weight[index] = _vector(up, mlp.up_proj.weight[index])
    mlp.down_proj.weight[:, index] = _vector(down, mlp.down_proj.weight[:, index])


def random_rotation(d_model: int, generator: torch.Generator) -> Float[Tensor, "d_model d_model"]:
    """An orthogonal matrix, uniform over all (Stewart 1980): QR of a normal one, its signs made unique."""
    q, r = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _readers(model: Decoder) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(gain, the weights that read what it scales) of every norm."""
    assert model.lm_head is not None, "a tied table cannot be folded; widen the model first"
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        yield (
            block.input_layernorm.weight,
            [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight],
        )
        yield block.post_attention_layernorm.weight, [mlp.gate_proj.weight, mlp.up_proj.weight]
    yield model.norm.weight, [model.lm_head.weight]


def _writers(model: Decoder) -> Iterator[Tensor]:
    for block in model.layers:
        yield block.self_attn.o_proj.weight
        yield block.mlp.down_proj.weight


def _vector(weights: Mapping[int, float] | Tensor, like: Tensor) -> Tensor:
    if isinstance(weights, Tensor):
        return weights.to(like)
    vector = torch.zeros_like(like)
    for index, weight in weights.items():
        vector[index] = weight
    return vector
