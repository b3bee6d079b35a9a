"""A Llama in equations: pre-norm blocks on a residual stream, any part of which can be run alone.

    resid[-1] = W_E[token]
    mid       = resid[l-1] + W_O attention(RMSNorm(resid[l-1]))       rotary positions, pairs (i, i + d_head/2)
    resid[l]  = mid + W_down (silu(W_gate n) * (W_up n)),  n = RMSNorm(mid)
    logits    = W_U RMSNorm(resid[last])                              W_U = W_E when tied

Parameter names are those of `transformers.LlamaForCausalLM` without its `model.` prefix. How queries
find keys is an argument (`Attend`), so that a causal pass, a pass that stores keys and values, sampling,
and replay of single tokens run through the same blocks and the same hooks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_steer.errors import InputError
from sae_steer.model.language_model import Continuation, LanguageModel, Suffix
from sae_steer.settings import DecoderSettings

Heads = Float[Tensor, "batch head query d_head"]
KVHeads = Float[Tensor, "batch kv_head query d_head"]
Attend = Callable[[int, Heads, KVHeads, KVHeads], Heads]
"""(layer, queries, keys, values) of the tokens at hand -> what each query reads. Keys are rotated already."""


def causal(layer: int, q: Heads, k: KVHeads, v: KVHeads) -> Heads:
    """Each token reads itself and all before it. Right padding needs no mask: nothing real looks ahead."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])


@dataclass
class Storing:
    """`causal`, keeping the keys and values of every layer it passes."""

    keys: dict[int, KVHeads] = field(default_factory=dict)
    values: dict[int, KVHeads] = field(default_factory=dict)

    def __call__(self, layer: int, q: Heads, k: KVHeads, v: KVHeads) -> Heads:
        """Store, then attend causally."""
        self.keys[layer], self.values[layer] = k, v
        return causal(layer, q, k, v)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, shape: DecoderSettings, layer: int):
        super().__init__()
        self.layer, self.d_head = layer, shape.d_head
        width = shape.n_heads * shape.d_head
        self.q_proj = nn.Linear(shape.d_model, width, bias=False)
        self.k_proj = nn.Linear(shape.d_model, shape.n_kv_heads * shape.d_head, bias=False)
        self.v_proj = nn.Linear(shape.d_model, shape.n_kv_heads * shape.d_head, bias=False)
        self.o_proj = nn.Linear(width, shape.d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch query d_model"], rope: "Rope", attend: Attend):
        """What the heads write to the residual stream."""
        mixed = attend(self.layer, rope(self._heads(self.q_proj, x)), *self.keys_and_values(x, rope))
        return self.o_proj(rearrange(mixed, "batch head query d_head -> batch query (head d_head)"))

    def keys_and_values(self, x: Float[Tensor, "batch query d_model"], rope: "Rope") -> tuple[KVHeads, KVHeads]:
        """What later tokens read of these."""
        return rope(self._heads(self.k_proj, x)), self._heads(self.v_proj, x)

    def _heads(self, proj: nn.Linear, x: Float[Tensor, "batch query d_model"]) -> Heads:
        return rearrange(proj(x), "batch query (head d_head) -> batch head query d_head", d_head=self.d_head)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: DecoderSettings):
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_mlp, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_mlp, bias=False)
        self.down_proj = nn.Linear(shape.d_mlp, shape.d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch query d_model"]):
        """W_down (silu(W_gate x) * (W_up x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each read from a norm of the stream and added to it. Its output is `resid_post`."""

    def __init__(self, shape: DecoderSettings, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.d_model, eps=shape.eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = nn.RMSNorm(shape.d_model, eps=shape.eps)
        self.mlp = MLP(shape)

    def forward(self, resid: Float[Tensor, "batch query d_model"], rope: "Rope", attend: Attend):
        """resid_pre -> resid_post."""
        resid = resid + self.self_attn(self.input_layernorm(resid), rope, attend)
        return resid + self.mlp(self.post_attention_layernorm(resid))


@dataclass(frozen=True)
class Rope:
    """Rotates the pairs (i, i + d_head/2) of a head by position * base^(-2i/d_head) (2104.09864)."""

    cos: Float[Tensor, "*batch query half"]
    sin: Float[Tensor, "*batch query half"]

    @classmethod
    def at(cls, positions: Int[Tensor, "*batch query"], shape: DecoderSettings) -> "Rope":
        """The rotation of tokens at `positions`, in float32."""
        angles = positions[..., None].float() * frequencies(shape).to(positions.device)
        angles = angles if positions.ndim == 1 else angles[:, None]  # room for the head axis
        return cls(angles.cos(), angles.sin())

    def __call__(self, x: Float[Tensor, "batch any_head query d_head"]) -> Float[Tensor, "batch any_head query d_head"]:
        """`x` rotated, in its own type."""
        first, second = x.float().chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, dim=-1).to(x.dtype)


def frequencies(shape: DecoderSettings) -> Float[Tensor, " half"]:
    """Radians a position of every pair of a head, scaled as Llama 3.1 does where the shape says so."""
    plain = shape.rope_base ** -(torch.arange(0, shape.d_head, 2) / shape.d_head)
    if (scaling := shape.rope_scaling) is None:
        return plain
    turns = scaling.n_ctx * plain / (2 * torch.pi)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


class Decoder(nn.Module, LanguageModel):
    """The whole model. `forward` gives logits; `embed`, `run` and `unembed` are its parts."""

    threads = True

    def __init__(self, shape: DecoderSettings):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.d_vocab, shape.d_model)
        self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.d_model, eps=shape.eps)
        self.lm_head = None if shape.tied else nn.Linear(shape.d_model, shape.d_vocab, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.embed_tokens.weight.device

    @property
    def W_U(self) -> Float[Tensor, "vocab d_model"]:
        """The unembedding, one row a token."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    @property
    def described(self) -> str:
        """All that fixes the function besides the weights."""
        # a field added later appears only where it is used, so that the hashes of older models stay
        return repr(self.shape).replace(", rope_scaling=None", "")

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The token embedding, one row a token."""
        return self.embed_tokens.weight

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        """What the final norm multiplies each dimension by."""
        return self.norm.weight

    def resid_post(self, layer: int) -> nn.Module:
        """What puts out the stream after block `layer`: the block."""
        return self.layers[layer]

    def writers(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """Attention and MLP of block `layer`, whose outputs are added to the stream."""
        return self.layers[layer].self_attn, self.layers[layer].mlp

    def embed(self, tokens: Int[Tensor, "batch query"]) -> Float[Tensor, "batch query d_model"]:
        """The residual stream before block 0."""
        return self.embed_tokens(tokens)

    def run(
        self,
        resid: Float[Tensor, "batch query d_model"],
        *,
        start: int = 0,
        stop: int | None = None,
        attend: Attend = causal,
        positions: Int[Tensor, " batch #query"] | None = None,
    ) -> Float[Tensor, "batch query d_model"]:
        """Carry `resid`, the input of block `start`, through the blocks before `stop` (default: all)."""
        places = torch.arange(resid.shape[1], device=resid.device) if positions is None else positions
        rope = Rope.at(places, self.shape)
        for block in self.layers[start:stop]:
            resid = block(resid, rope, attend)
        return resid

    def suffix(self, resid: Float[Tensor, "batch pos d_model"], start: int) -> Suffix:
        """The blocks from `start` on, with the keys and values of a clean pass."""
        from sae_steer.model.suffix import DecoderSuffix

        stored = Storing()
        self.run(resid, start=start, attend=stored)
        return DecoderSuffix(self, start, stored)

    def continuation(self, prompts: Sequence[Sequence[int]]) -> Continuation:
        """The prompts, read, to be continued token by token."""
        from sae_steer.model.continuing import DecoderContinuation

        return DecoderContinuation(self, prompts)

    def resid_posts(
        self, tokens: Int[Tensor, "batch pos"], layers: tuple[int, ...]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """The streams after the blocks asked for; nothing above the last of them is computed."""
        found, resid, below = {}, self.embed(tokens), 0
        for layer in sorted(set(layers)):
            self.check_layer(layer)
            resid = self.run(resid, start=below, stop=layer + 1)
            found[layer], below = resid, layer + 1
        return found

    def unembed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Final norm and unembedding; on a stream below the last block, the logit lens."""
        return F.linear(self.norm(resid), self.W_U)

    def unembed_frozen(
        self, resid: Float[Tensor, "*rows d_model"], change: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits of resid + change, the final norm dividing by what it divides `resid` by."""
        scale = resid.pow(2).mean(-1, keepdim=True).add(self.norm.eps).rsqrt()
        return F.linear((resid + change) * scale * self.gain, self.W_U)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits."""
        return self.unembed(self.run(self.embed(tokens)))


def as_decoder(model: LanguageModel, purpose: str) -> Decoder:
    """`model`, which must be one of our own to serve the purpose; another is an `InputError`.

    Args:
        purpose: what needs its weights, as a sentence: "the self-test plants truths in weights".
    """
    if not isinstance(model, Decoder):
        raise InputError(
            f"{purpose}, which only a Llama that the package reads itself has; not a {type(model).__name__}"
        )
    return model


def init_decoder(shape: DecoderSettings, generator: torch.Generator) -> Decoder:
    """A decoder with fresh weights: normal, 0.02, the writes to the stream scaled by 1/sqrt(2 n_layers)."""
    model = Decoder(shape)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            continue  # gains of the norms stay one
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = 0.02 / (2 * shape.n_layers) ** 0.5 if writes else 0.02
        with torch.no_grad():
            parameter.normal_(0.0, scale, generator=generator)
    return model
