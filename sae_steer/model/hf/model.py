"""Any causal language model that `transformers` runs, as a model of a pair: its own forward, its own weights.

The readout is the model's own too: norm, head, and whatever it does to its logits (soft caps, scales) are run by its
forward with every block skipped.
"""

import inspect
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_steer.errors import InputError
from sae_steer.model.hf.norm import FinalNorm
from sae_steer.model.hf.places import Done, Place, Run, in_place
from sae_steer.model.hf.structure import find_parts
from sae_steer.model.hf.writers import find_terms
from sae_steer.model.language_model import Continuation, LanguageModel, Suffix

NOT_OF_THE_FUNCTION = (
    "_name_or_path", "architectures", "attn_implementation", "dtype", "torch_dtype", "id2label", "label2id",
    "initializer_range", "output_attentions", "output_hidden_states", "return_dict", "transformers_version",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Fields of a `transformers` config on which no output depends."""
ONE_AT_A_TIME = threading.RLock()
"""Held for the length of a forward, while blocks stand in places."""
PROBE = 12
"""Tokens of the text by which a model's parts are found."""


@dataclass(frozen=True)
class HFShape:
    """Counts and widths by their TransformerLens names."""

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int


class HFModel(nn.Module, LanguageModel):
    """A `transformers` causal language model. What has no stream, norm or head of its own is an `InputError`."""

    threads = False  # they would wait for one another

    def __init__(self, hf: nn.Module):
        super().__init__()
        self.hf = hf.eval().requires_grad_(False)
        config = hf.config.get_text_config()
        rows, self.width = hf.get_input_embeddings().weight.shape
        tokens = torch.arange(2 * PROBE, device=self.device).view(2, PROBE) * 7 % rows
        self.parts = find_parts(hf, tokens)
        head = self.parts.head.weight.shape
        if not head[1] == self.parts.width == self.width:
            raise InputError(
                f"a {type(hf).__name__} has an embedding {self.width} wide, a stream {self.parts.width} wide and an "
                f"unembedding {head[1]} wide; a model of a pair has one width"
            )
        self.shape = HFShape(len(self.parts.blocks), self.width, int(head[0]), _n_ctx(config))
        pairs = zip(self.parts.blocks, self.parts.extras, strict=True)
        self._places = (tuple(Place(block, layer, extras) for layer, (block, extras) in enumerate(pairs)),)
        self.replays_masked = False  # `checking` finds out
        self.takes_positions = "position_ids" in inspect.signature(hf.forward).parameters

    @property
    def places(self) -> tuple[Place, ...]:
        """The blocks with their taps; in a tuple of its own, so that parameters are counted once."""
        return self._places[0]

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.parts.blocks

    @property
    def embed_tokens(self) -> nn.Module:
        """What reads the tokens."""
        return self.parts.embedding

    @property
    def norm(self) -> nn.Module:
        """What the stream enters after the last block."""
        return self.parts.norm or self.parts.head

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the stream."""
        return self.hf.get_input_embeddings().weight.dtype

    @property
    def W_U(self) -> Float[Tensor, "vocab d_model"]:
        """The unembedding, one row a token."""
        return self.parts.head.weight

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The token embedding, one row a token."""
        return self.parts.embedding.weight

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        """What the final norm multiplies each dimension by."""
        return self.W_U.new_ones(self.width) if self.equation is None else self.equation.gain.to(self.device)

    @cached_property
    def equation(self) -> FinalNorm | None:
        """The final norm's equation; None where there is no norm."""
        return None if self.parts.norm is None else FinalNorm.of(self.parts.norm, self.width, self.W_U)

    @property
    def described(self) -> str:
        """Class, and every field of the config that an output depends on."""
        facts = {key: value for key, value in self.hf.config.to_dict().items() if key not in NOT_OF_THE_FUNCTION}
        return json.dumps({"class": type(self.hf).__name__, **facts}, sort_keys=True, default=str)

    def resid_post(self, layer: int) -> nn.Module:
        """The tap of the stream after block `layer`."""
        return self.places[layer].out

    def resid_pre(self, layer: int) -> nn.Module:
        """What takes in the stream before block `layer`; after the last, the final norm."""
        return self.places[layer].into if layer < self.shape.n_layers else self.norm

    def writers(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The taps of what attention and MLP of block `layer` add to the stream, found by their sum."""
        if not self.places[layer].terms:
            tokens = torch.arange(PROBE, device=self.device)[None] * 7 % self.shape.d_vocab
            for place, terms in zip(self.places, find_terms(self, tokens), strict=True):
                place.terms = terms
        attention, mlp = self.places[layer].terms
        return attention.tap, mlp.tap

    def resid_posts(
        self, tokens: Int[Tensor, "batch pos"], layers: tuple[int, ...]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """The streams after the blocks asked for; nothing above the last of them is computed."""
        for layer in layers:
            self.check_layer(layer)
        run = Run(stop=max(layers) + 1, keep=frozenset(layers))
        self.go(run, tokens)
        return {layer: run.streams[layer] for layer in sorted(set(layers))}

    def run(
        self, resid: Float[Tensor, "batch pos d_model"], *, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Carry `resid`, the input of block `start`, through the blocks before `stop` (default: all)."""
        stop = self.shape.n_layers if stop is None else stop
        if start >= stop:
            return resid
        run = Run(start=start, stop=stop, resid=resid.to(self.dtype))
        self.go(run, self.no_tokens(resid))
        return run.last

    def suffix(self, resid: Float[Tensor, "batch pos d_model"], start: int) -> Suffix:
        """The blocks from `start` on, run once on the clean stream below them."""
        from sae_steer.model.hf.replaying import suffix_of

        return suffix_of(self, resid, start)

    def continuation(self, prompts: Sequence[Sequence[int]]) -> Continuation:
        """The prompts, read, to be continued token by token."""
        from sae_steer.model.hf.continuing import HFContinuation

        return HFContinuation(self, prompts)

    def unembed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """The model's own readout of a stream after its last block; below the last block, the logit lens."""
        flat = resid.reshape(-1, 1, self.width).to(self.dtype)
        if not len(flat):
            return resid.new_empty(*resid.shape[:-1], self.shape.d_vocab)
        logits = self.go(Run(start=self.shape.n_layers, resid=flat), self.no_tokens(flat)).logits
        return logits.reshape(*resid.shape[:-1], -1)

    def unembed_frozen(
        self, resid: Float[Tensor, "*rows d_model"], change: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits of resid + change, the final norm dividing by what it divides `resid` by."""
        if self.equation is None:
            return self.unembed(resid + change)
        normed = self.equation.frozen(resid, change).reshape(-1, 1, self.width).to(self.dtype)
        with ONE_AT_A_TIME:
            hook = self.norm.register_forward_hook(lambda module, inputs, output: normed)
            try:
                return self.unembed(resid)
            finally:
                hook.remove()

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits."""
        return self.go(Run(), tokens).logits

    def go(self, run: Run, tokens: Int[Tensor, "batch pos"], **inputs: Any) -> Any:
        """One forward of the model with its blocks in their places; None where the run ends below the logits."""
        inputs = {"use_cache": False, **inputs}
        with ONE_AT_A_TIME, in_place(self.parts.blocks, self.places, run):
            try:
                return self.hf(input_ids=tokens, **inputs)
            except Done:
                return None

    def no_tokens(self, resid: Float[Tensor, "batch pos d_model"]) -> Int[Tensor, "batch pos"]:
        """Tokens for a run that begins above the embedding, which reads nothing of them but their shape."""
        return torch.zeros(resid.shape[:2], dtype=torch.long, device=self.device)


def _n_ctx(config: Any) -> int:
    """The longest text, by any of the names configs have for it; where there is no limit, a million tokens."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(config, name, None), int) and length > 0:
            return length
    return 1_000_000
