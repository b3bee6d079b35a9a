"""What the rest of the package asks of a model, whoever runs it: our `Decoder`, or TransformerLens through `lens`."""

import hashlib
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Shape(Protocol):
    """Counts and widths by their TransformerLens names; `DecoderSettings` and TransformerLens configs have them."""

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int


@runtime_checkable
class LanguageModel(Protocol):
    """A causal model with one residual stream. Texts are right-padded: nothing real looks ahead.

    Models inherit it: from Python 3.12 on, `isinstance` sees nothing of what `nn.Module` keeps in tables of its own.
    """

    shape: Shape
    layers: nn.ModuleList
    """The blocks, each from residual stream to residual stream."""
    embed_tokens: nn.Module
    norm: nn.Module
    """What the stream enters after the last block."""

    @property
    def device(self) -> torch.device:
        """Where the weights live."""

    @property
    def n_parameters(self) -> int:
        """Parameters, a tied table counted once."""

    @property
    def W_U(self) -> Float[Tensor, "vocab d_model"]:
        """The unembedding, one row a token."""

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The token embedding, one row a token."""

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        """What the final norm multiplies each dimension by."""

    @property
    def described(self) -> str:
        """All that fixes the function besides the weights."""

    def check_layer(self, layer: int, name: str = "the model") -> None:
        """Raise `InputError` unless there is a block `layer`."""

    def resid_posts(
        self, tokens: Int[Tensor, "batch pos"], layers: tuple[int, ...]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """The streams after the blocks asked for; nothing above the last of them is computed."""

    def resid_post(self, layer: int) -> nn.Module:
        """What puts out the stream after block `layer`; whoever reads that stream reads behind its hooks."""

    def writers(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """What puts out the terms that attention and MLP of block `layer` add to the stream."""

    def run(
        self, resid: Float[Tensor, "batch pos d_model"], *, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Carry `resid`, the input of block `start`, through the blocks before `stop` (default: all)."""

    def unembed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Final norm and unembedding; on a stream below the last block, the logit lens."""

    def unembed_frozen(
        self, resid: Float[Tensor, "*rows d_model"], change: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits of resid + change, the final norm dividing by what it divides `resid` by."""

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits."""


def fingerprint(model: nn.Module) -> str:
    """A hash of what a model computes, its description and its weights, whatever file they came from."""
    digest = hashlib.sha256()
    digest.update(model.described.encode())
    for name, tensor in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
