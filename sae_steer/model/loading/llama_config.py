"""A Llama's `config.json` as the shape of a decoder, every field read as `transformers` reads it.

A field that changes what the model computes is honoured or refused by name; what the decoder does not compute is
`NotNativeError`, so that `transformers` can run the model itself. Fields that `transformers` does not look at are not
looked at here. Of rotary settings given twice, `rope_scaling` stands for all of `rope_parameters`, and a base inside
either for the `rope_theta` beside it.
"""

from pathlib import Path

import torch

from sae_steer.errors import InputError, NotNativeError
from sae_steer.model.loading.sizes import number, size
from sae_steer.settings import DecoderSettings, RopeScaling

BASE = 10_000.0
NOT_COMPUTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "is_causal": True,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "layer_types": None,
    "per_layer_config": None,
    "quantization_config": None,
    "transformers_weights": None,
}
"""Fields that change the function or name another file, and the one value the decoder computes."""
ADAPTER = "adapter_config.json"


def llama_shape(path: Path, config: dict) -> DecoderSettings:
    """The shape that the `config.json` at `path` describes."""
    for key, computed in NOT_COMPUTED.items():
        if config.get(key) not in (None, computed):
            raise NotNativeError(f"{path} has {key} {config[key]!r}; the decoder computes {computed!r} alone")
    if (path.parent / ADAPTER).is_file():
        raise InputError(
            f"{path.parent} holds an adapter ({ADAPTER}) beside a model, which transformers adds where peft is "
            "installed and leaves out where it is not; merge it, or move it away"
        )
    heads, width = size(path, config, "num_attention_heads"), size(path, config, "hidden_size")
    kv_heads = size(path, config, "num_key_value_heads", heads)
    d_head = size(path, config, "head_dim", width // heads)
    if heads % kv_heads or d_head % 2:
        raise InputError(
            f"{path} has {heads} heads of width {d_head} on {kv_heads} key-value heads; "
            "heads must divide evenly and their width by two"
        )
    n_ctx = size(path, config, "max_position_embeddings", 2048)
    rope = _rope(path, config)
    return DecoderSettings(
        n_layers=size(path, config, "num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_model=width,
        d_head=d_head,
        d_mlp=size(path, config, "intermediate_size"),
        d_vocab=size(path, config, "vocab_size"),
        n_ctx=n_ctx,
        eps=number(path, config, "rms_norm_eps", 1e-6),
        rope_base=number(path, config | rope, "rope_theta", BASE),
        rope_scaling=_scaling(path, config, rope, n_ctx),
        tied=_switch(path, config, "tie_word_embeddings"),
    )


def stated_dtype(path: Path, config: dict) -> torch.dtype | None:
    """The type that `transformers` gives the weights, whatever the file holds them in; None if the file decides."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None:
        return None
    dtype = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise InputError(f"{path} has dtype {named!r}; give 'float32', 'bfloat16' or 'float16'")
    return dtype


def _rope(path: Path, config: dict) -> dict:
    """The rotary settings, one flat table."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path} has rotary settings {rope!r}, which are no table; copy the config again")
    if any(isinstance(value, dict) for value in rope.values()):
        raise NotNativeError(f"{path} has rotary settings of each kind of layer; the decoder has one for all")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotNativeError(
            f"{path} has partial_rotary_factor {rope['partial_rotary_factor']!r}; the decoder rotates whole heads"
        )
    return rope


def _scaling(path: Path, config: dict, rope: dict, n_ctx: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise NotNativeError(
            f"{path} asks for scaled rotary positions of type {kind!r}; the decoder computes 'default' and 'llama3'"
        )
    before = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", n_ctx))
    try:
        factors = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        return RopeScaling(*factors, float(before))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} asks for rotary scaling 'llama3' without factor, low_freq_factor and high_freq_factor as numbers; "
            "copy the config again"
        ) from error


def _switch(path: Path, config: dict, name: str) -> bool:
    value = config.get(name)
    if value not in (None, True, False) or not isinstance(value, bool | None):
        raise InputError(f"{path} has {name} {value!r}; write true or false")
    return bool(value)
