"""The stream inside each block: before it, with its attention's part added, and after it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_steer.errors import InputError
from sae_steer.model.language_model import LanguageModel


@dataclass(frozen=True)
class InBlock:
    """A block's stations. Where attention and MLP run side by side, `between` has the attention's part alone."""

    before: Float[Tensor, "batch pos d_model"]
    between: Float[Tensor, "batch pos d_model"] | None
    """None where what attention and MLP write cannot be told apart."""
    after: Float[Tensor, "batch pos d_model"]


@torch.no_grad()
def read_parts(model: LanguageModel, tokens: Int[Tensor, "batch pos"]) -> list[InBlock]:
    """The stations of every block over right-padded tokens."""
    layers = range(model.shape.n_layers)
    attention = _attention(model)
    seen: dict[tuple[str, int], Tensor] = {}

    def output(name: str, layer: int) -> Callable:
        return lambda module, inputs, out: seen.__setitem__((name, layer), out)

    def entering(layer: int) -> Callable:
        return lambda module, inputs: seen.__setitem__(("before", layer), inputs[0])

    hooks = [model.resid_pre(layer).register_forward_pre_hook(entering(layer)) for layer in layers]
    hooks += [model.resid_post(layer).register_forward_hook(output("after", layer)) for layer in layers]
    hooks += [module.register_forward_hook(output("attention", layer)) for layer, module in enumerate(attention)]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        InBlock(
            before=seen["before", layer],
            between=seen["before", layer] + seen["attention", layer] if attention else None,
            after=seen["after", layer],
        )
        for layer in layers
    ]


def _attention(model: LanguageModel) -> list[nn.Module]:
    """What puts out the attention's term of every block; none where the terms cannot be told apart."""
    try:
        return [model.writers(layer)[0] for layer in range(model.shape.n_layers)]
    except InputError:
        return []
