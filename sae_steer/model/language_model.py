"""What the rest of the package asks of a model, whoever runs it: our `Decoder`, or TransformerLens through `lens`."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_steer.errors import InputError
from sae_steer.world import in_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


class Shape(Protocol):
    """Counts and widths by their TransformerLens names; `DecoderSettings` and TransformerLens configs have them."""

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int


@runtime_checkable
class Suffix(Protocol):
    """The blocks from one on, and what the clean pass stored in them."""

    def joint(
        self, resid: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch edit"]
    ) -> Float[Tensor, "batch edit d_model"]:
        """Whole texts carried through the blocks, and read at `positions` alone."""

    def many(self, row: int, position: int, resid: Float[Tensor, " copy d_model"]) -> Float[Tensor, " copy d_model"]:
        """Replacements of one token of one text, each carried through the blocks alone."""

    def single(
        self, positions: Int[Tensor, "batch edit"], resid: Float[Tensor, "copy batch edit d_model"]
    ) -> Float[Tensor, "copy batch edit d_model"]:
        """Replacements of tokens at every position of a batch of texts, each carried alone."""


@runtime_checkable
class Continuation(Protocol):
    """Texts that grow by a token a row."""

    logits: Float[Tensor, "row vocab"]
    """What follows each row's last token."""

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with some of the rows, given in rising order."""

    def append(self, tokens: Int[Tensor, " row"], going: Bool[Tensor, " row"]) -> None:
        """Read one more token of each row; what follows in rows not `going` means nothing."""


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
    threads: bool
    """Whether threads may run it side by side."""

    @property
    def device(self) -> torch.device:
        """Where the weights live."""

    @property
    def n_parameters(self) -> int:
        """Parameters, a tied table counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

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

    def each(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """[work(item) for every item], work that runs this model: side by side where it may."""
        return in_threads(work, items, self.device) if self.threads else [work(item) for item in items]

    def check_layer(self, layer: int, name: str = "the model") -> None:
        """Raise `InputError` unless there is a block `layer`."""
        if not 0 <= layer < self.shape.n_layers:
            raise InputError(f"{name} has no layer {layer}; it has layers 0 to {self.shape.n_layers - 1}")

    def resid_posts(
        self, tokens: Int[Tensor, "batch pos"], layers: tuple[int, ...]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """The streams after the blocks asked for; nothing above the last of them is computed."""

    def resid_post(self, layer: int) -> nn.Module:
        """What puts out the stream after block `layer`; whoever reads that stream reads behind its hooks."""

    def resid_pre(self, layer: int) -> nn.Module:
        """What takes in the stream before block `layer`, its first input; after the last block, the final norm."""
        return [*self.layers, self.norm][layer]

    def writers(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """What puts out the terms that attention and MLP of block `layer` add to the stream."""

    def run(
        self, resid: Float[Tensor, "batch pos d_model"], *, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Carry `resid`, the input of block `start`, through the blocks before `stop` (default: all)."""

    def suffix(self, resid: Float[Tensor, "batch pos d_model"], start: int) -> Suffix:
        """The blocks from `start` on, run once on the clean stream below them, their keys and values kept."""

    def continuation(self, prompts: Sequence[Sequence[int]]) -> Continuation:
        """The prompts, read, to be continued token by token."""

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
