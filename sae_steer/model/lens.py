"""TransformerLens both ways: any model it loads as one of a pair, and our decoder for its users' tools.

The only importer of transformer_lens, which takes seconds: imported when first asked for.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_steer.errors import InputError
from sae_steer.model.decoder import Decoder, as_decoder
from sae_steer.model.language_model import Continuation, LanguageModel, Suffix
from sae_steer.settings import RopeScaling

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, HookedTransformerConfig


def to_hooked_transformer(model: LanguageModel) -> "HookedTransformer":
    """A `HookedTransformer` with the same weights and the same residual stream: nothing folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = as_decoder(model, "a HookedTransformer is made from weights under known names")
    shape = model.shape
    config = HookedTransformerConfig(
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        n_ctx=shape.n_ctx,
        d_head=shape.d_head,
        n_heads=shape.n_heads,
        n_key_value_heads=None if shape.n_kv_heads == shape.n_heads else shape.n_kv_heads,
        d_mlp=shape.d_mlp,
        d_vocab=shape.d_vocab,
        act_fn="silu",
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=shape.d_head,
        rotary_base=shape.rope_base,
        rotary_adjacent_pairs=False,
        eps=shape.eps,
        **_scaled_positions(shape.rope_scaling),
        tokenizer_prepends_bos=False,
        default_prepend_bos=False,
        device=str(model.device),
    )
    with _deprecation_is_known():
        hooked = HookedTransformer(config)
    known = hooked.state_dict()
    ours = _hooked_names(model, underscore=shape.n_kv_heads != shape.n_heads)
    assert set(ours) <= set(known), f"TransformerLens does not know {sorted(set(ours) - set(known))}"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in known.items() if ".b_" in name or "._b_" in name}
    hooked.load_state_dict({**known, **zeros, **ours})
    return hooked.eval()


def _scaled_positions(scaling: RopeScaling | None) -> dict:
    """Llama 3's scaling under TransformerLens's names."""
    if scaling is None:
        return {}
    return {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": scaling.factor,
        "NTK_by_parts_low_freq_factor": scaling.low,
        "NTK_by_parts_high_freq_factor": scaling.high,
        "NTK_original_ctx_len": int(scaling.n_ctx),
    }


def _hooked_names(model: Decoder, *, underscore: bool) -> dict:
    from einops import rearrange

    kv = "_" if underscore else ""
    split = "(head d_head) d_model -> head d_model d_head"
    tensors = {"embed.W_E": model.embed_tokens.weight, "unembed.W_U": model.W_U.T, "ln_final.w": model.norm.weight}
    for layer, block in enumerate(model.layers):
        at, attention = f"blocks.{layer}", block.self_attn
        d_head = model.shape.d_head
        tensors |= {
            f"{at}.ln1.w": block.input_layernorm.weight,
            f"{at}.ln2.w": block.post_attention_layernorm.weight,
            f"{at}.attn.W_Q": rearrange(attention.q_proj.weight, split, d_head=d_head),
            f"{at}.attn.{kv}W_K": rearrange(attention.k_proj.weight, split, d_head=d_head),
            f"{at}.attn.{kv}W_V": rearrange(attention.v_proj.weight, split, d_head=d_head),
            f"{at}.attn.W_O": rearrange(
                attention.o_proj.weight, "d_model (head d_head) -> head d_head d_model", d_head=d_head
            ),
            f"{at}.mlp.W_gate": block.mlp.gate_proj.weight.T,
            f"{at}.mlp.W_in": block.mlp.up_proj.weight.T,
            f"{at}.mlp.W_out": block.mlp.down_proj.weight.T,
        }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


NOT_OF_THE_FUNCTION = (
    "device", "dtype", "seed", "n_devices", "n_params", "model_name", "tokenizer_name", "original_architecture",
    "init_mode", "init_weights", "initializer_range", "from_checkpoint", "checkpoint_index", "checkpoint_label_type",
    "checkpoint_value", "default_prepend_bos", "tokenizer_prepends_bos", "trust_remote_code",
)  # fmt: skip
"""Fields of a TransformerLens config on which no output depends."""


KeysAndValues = tuple[
    Float[Tensor, "batch past kv_head d_head"],
    Float[Tensor, "batch past kv_head d_head"],
]


class LensModel(nn.Module, LanguageModel):
    """A `HookedTransformer` as a model of a pair: its own forward, weights as they are, nothing folded or centred."""

    threads = False  # TransformerLens changes its tokenizer, and fills its caches, for the length of a call

    def __init__(self, hooked: "HookedTransformer"):
        super().__init__()
        if hooked.cfg.attention_dir != "causal":
            raise InputError(
                f"'{hooked.cfg.model_name}' attends {hooked.cfg.attention_dir}; models of a pair attend causally"
            )
        if hooked.cfg.positional_embedding_type == "shortformer":
            raise InputError(
                f"'{hooked.cfg.model_name}' keeps its positions outside the residual stream (shortformer), which no "
                "part of the stream can be run without; take a model with positions in the stream"
            )
        self.hooked = hooked.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> "LensModel":
        """Moved by TransformerLens itself, whose config says where inputs go."""
        self.hooked.to(device, print_details=False)
        return self

    @property
    def shape(self) -> "HookedTransformerConfig":
        """The TransformerLens config, whose names `DecoderSettings` shares."""
        return self.hooked.cfg

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, each from residual stream to residual stream."""
        return self.hooked.blocks

    @property
    def embed_tokens(self) -> nn.Module:
        """What reads the tokens."""
        return self.hooked.embed

    @property
    def norm(self) -> nn.Module:
        """What the stream enters after the last block."""
        return self.hooked.ln_final if self.shape.normalization_type is not None else self.hooked.unembed

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.hooked.W_E.device

    @property
    def W_U(self) -> Float[Tensor, "vocab d_model"]:
        """The unembedding, one row a token."""
        return self.hooked.W_U.T

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The token embedding, one row a token."""
        return self.hooked.W_E

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        """What the final norm multiplies each dimension by; ones where it has been folded away."""
        gain = getattr(self.hooked.ln_final, "w", None)
        return self.hooked.W_E.new_ones(self.shape.d_model) if gain is None else gain

    @property
    def described(self) -> str:
        """Every field of the config that an output depends on."""
        facts = {name: str(value) for name, value in vars(self.shape).items() if name not in NOT_OF_THE_FUNCTION}
        return json.dumps(facts, sort_keys=True)

    def resid_posts(
        self, tokens: Int[Tensor, "batch pos"], layers: tuple[int, ...]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """The streams after the blocks asked for; nothing above the last of them is computed."""
        for layer in layers:
            self.check_layer(layer)
        sites = {layer: f"blocks.{layer}.hook_resid_post" for layer in sorted(set(layers))}
        _, cache = self.hooked.run_with_cache(
            tokens,
            names_filter=list(sites.values()),
            stop_at_layer=max(sites) + 1,
            return_type=None,
            **self._right_padded,
        )
        return {layer: cache[site] for layer, site in sites.items()}

    def resid_post(self, layer: int) -> nn.Module:
        """The hook point of the stream after block `layer`."""
        return self.hooked.blocks[layer].hook_resid_post

    def writers(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The hook points of what attention and MLP of block `layer` add to the stream."""
        return self.hooked.blocks[layer].hook_attn_out, self.hooked.blocks[layer].hook_mlp_out

    def run(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        *,
        start: int = 0,
        stop: int | None = None,
        past: dict[int, KeysAndValues] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Carry `resid`, the input of block `start`, through the blocks before `stop` (default: all).

        Args:
            past: by block, what `keys_and_values` found for the tokens that come before these.
        """
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry as Entry

        stop = self.shape.n_layers if stop is None else stop
        if start == stop:
            return resid
        entries = None if past is None else {layer: Entry(*pair, frozen=True) for layer, pair in past.items()}
        return self.hooked(resid, start_at_layer=start, stop_at_layer=stop, past_kv_cache=entries)

    def keys_and_values(self, resid: Float[Tensor, "batch pos d_model"], start: int) -> dict[int, KeysAndValues]:
        """What the blocks from `start` on attend to, by block, before rotation: TransformerLens rotates on reading."""
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry as Entry

        above = range(start, self.shape.n_layers)
        entries = {layer: Entry.init_cache_entry(self.shape, self.device, len(resid)) for layer in above}
        if entries:
            self.hooked(resid, start_at_layer=start, stop_at_layer=self.shape.n_layers, past_kv_cache=entries)
        return {layer: (entry.past_keys, entry.past_values) for layer, entry in entries.items()}

    def suffix(self, resid: Float[Tensor, "batch pos d_model"], start: int) -> Suffix:
        """The blocks from `start` on, with the keys and values of a clean pass."""
        from sae_steer.model.suffix import LensSuffix

        return LensSuffix(self, start, self.keys_and_values(resid, start))

    def continuation(self, prompts: Sequence[Sequence[int]]) -> Continuation:
        """The prompts, read, to be continued token by token."""
        from sae_steer.model.continuing import Rereading

        return Rereading(self, prompts)

    def unembed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Final norm, unembedding and whatever the model does to its logits; below the last block, the logit lens."""
        flat = resid.reshape(1, -1, resid.shape[-1])
        logits = self.hooked(flat, start_at_layer=self.shape.n_layers, return_type="logits")
        return logits.reshape(*resid.shape[:-1], logits.shape[-1])

    def unembed_frozen(
        self, resid: Float[Tensor, "*rows d_model"], change: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits of resid + change, the final norm dividing by what it divides `resid` by."""
        if self.shape.normalization_type is None:
            return self.unembed(resid + change)
        scale: list[Tensor] = []

        def keep(value: Tensor, hook: object) -> None:
            scale.append(value)

        with self.hooked.hooks([("ln_final.hook_scale", keep)]):
            self.unembed(resid)
        with self.hooked.hooks([("ln_final.hook_scale", lambda value, hook: scale[0])]):
            return self.unembed(resid + change)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits."""
        return self.hooked(tokens, return_type="logits", **self._right_padded)

    @property
    def _right_padded(self) -> dict:
        """A tokenizer that pads on the left would have TransformerLens mask whatever looks like padding there."""
        return {} if self.hooked.tokenizer is None else {"padding_side": "right"}


def adapt(model: object) -> LensModel:
    """A `HookedTransformer` made a model of a pair; anything else is an `InputError`."""
    from transformer_lens import HookedTransformer

    if not isinstance(model, HookedTransformer):
        raise InputError(f"a {type(model).__name__} cannot be a model of a pair; give a Decoder or a HookedTransformer")
    return LensModel(model)


def load_lens(name: str) -> LensModel:
    """What TransformerLens loads under `name` (`tl:NAME` in a pair.toml), without any processing of the weights."""
    import transformer_lens

    try:
        with _deprecation_is_known():
            hooked = transformer_lens.HookedTransformer.from_pretrained_no_processing(name)
    except (OSError, ValueError, KeyError) as error:  # unknown names, no network, files that are not there
        told = " ".join(str(error).split())[:300]
        raise InputError(
            f"TransformerLens cannot load 'tl:{name}' ({told}); give a name of its model table, and once a network "
            "connection to fetch it with"
        ) from error
    return LensModel(hooked)


def official_name(name: str) -> str | None:
    """What TransformerLens calls the model of that name or alias, in lower case and without its owner.

    Names it does not know are their own if they have an owner (ORG/NAME); others may mean anything: None.
    """
    from transformer_lens.loading_from_pretrained import get_official_model_name

    known = name if "/" in name else None
    for alias in (name, name.rsplit("/", 1)[-1]):
        try:
            known = get_official_model_name(alias)
            break
        except ValueError:
            continue
    return known and known.rsplit("/", 1)[-1].lower()


def tokenizer_json(model: LensModel) -> str | None:
    """The tokenizer.json of the tokenizer that came with the model; None if there is none of that kind."""
    backend = getattr(model.hooked.tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


@contextmanager
def _deprecation_is_known() -> Iterator[None]:
    """TransformerLens announces the end of `HookedTransformer` in version 4; the package asks for versions below."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer.* is deprecated", DeprecationWarning)
        yield
