"""Attention heads one by one: what each attends to, and the model with one of them silenced."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_steer.errors import InputError, NotDeliveredError
from sae_steer.model.decoder import Decoder, Heads, KVHeads
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.lens import LensModel

Patterns = Float[Tensor, "batch head query key"]
Look = Callable[[int, Patterns, Heads], None]
"""(layer, attention of every query to every key, what each head reads by it)."""


@dataclass
class Looking:
    """Causal attention with its pattern written out, which is shown to `look` before anything is made of it."""

    look: Look

    def __call__(self, layer: int, q: Heads, k: KVHeads, v: KVHeads) -> Heads:
        """Attend, show, go on."""
        keys, values = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        scores = q @ keys.mT / q.shape[-1] ** 0.5
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        pattern = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        read = pattern @ values
        self.look(layer, pattern, read)
        return read


def has_heads(model: LanguageModel) -> bool:
    """Whether heads can be read and replaced: in our decoder and in models of TransformerLens."""
    return isinstance(model, Decoder | LensModel)


def check_has_heads(model: LanguageModel, name: str) -> None:
    """Raise `InputError` unless `has_heads`."""
    if not has_heads(model):
        raise InputError(
            f"model '{name}' is run by transformers, where heads have no common names; heads are studied in models of "
            "the Llama family and in those TransformerLens runs: name it tl:NAME in pair.toml"
        )


@torch.no_grad()
def read_heads(model: LanguageModel, tokens: Int[Tensor, "batch pos"], look: Look) -> None:
    """Show `look` every block's attention over right-padded `tokens`, from the lowest block up."""
    if isinstance(model, Decoder):
        model.run(model.embed(tokens), attend=Looking(look))
        return
    assert isinstance(model, LensModel), "see has_heads"
    shown: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable:
        return lambda value, hook: shown.__setitem__(layer, value)

    def show(layer: int) -> Callable:
        order = "batch pos head d_head -> batch head pos d_head"
        return lambda value, hook: look(layer, shown.pop(layer), rearrange(value, order))

    points = [
        (f"blocks.{layer}.attn.hook_{name}", made(layer))
        for layer in range(model.shape.n_layers)
        for name, made in (("pattern", keep), ("z", show))
    ]
    with model.hooked.hooks(points):
        model(tokens)


@contextmanager
def head_replaced(
    model: LanguageModel, layer: int, head: int, value: Float[Tensor, " d_head"]
) -> Iterator[LanguageModel]:
    """While it lasts, the head reads `value` at every position, whatever it attends to; gone afterwards.

    Zeros take the head out of the model; its mean over texts keeps what it says on average.
    """
    check_head(model, layer, head)
    met = 0

    def of_decoder(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        nonlocal met
        met += 1
        changed = inputs[0].clone()
        changed[..., head * len(value) : (head + 1) * len(value)] = value.to(changed)
        return (changed,)

    def of_lens(module: nn.Module, inputs: tuple[Tensor, ...], z: Tensor) -> Tensor:
        nonlocal met
        met += 1
        changed = z.clone()
        changed[:, :, head] = value.to(changed)
        return changed

    if isinstance(model, Decoder):
        hook = model.layers[layer].self_attn.o_proj.register_forward_pre_hook(of_decoder)
    else:
        hook = model.layers[layer].attn.hook_z.register_forward_hook(of_lens)
    try:
        yield model
    finally:
        hook.remove()
    if not met:
        raise NotDeliveredError(f"head L{layer}H{head} was never asked; run the model inside the `with`")


def check_head(model: LanguageModel, layer: int, head: int) -> None:
    """Raise `InputError` unless block `layer` has a head `head`."""
    model.check_layer(layer)
    if not 0 <= head < model.shape.n_heads:
        raise InputError(f"layer {layer} has no head {head}; it has heads 0 to {model.shape.n_heads - 1}")
