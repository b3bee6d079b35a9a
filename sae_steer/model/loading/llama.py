"""A Hugging Face Llama folder: its config as a shape and back, and its names, which must fit exactly."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sae_steer.errors import InputError
from sae_steer.files import replacing, write_text
from sae_steer.model.decoder import Decoder
from sae_steer.model.loading.sizes import size
from sae_steer.settings import DecoderSettings, RopeScaling

PREFIX = "model."
IGNORED = ("rotary_emb.inv_freq",)
"""Buffers some writers store; positions are computed here."""


def save_decoder(model: Decoder, folder: Path, *, dtype: torch.dtype, pad_token_id: int | None = None) -> Path:
    """Write `model` so that `AutoModelForCausalLM.from_pretrained(folder)` reads it; returns `folder`."""
    folder = Path(folder)
    tensors = {_hub_name(name): tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as scratch:
        save_file(tensors, scratch, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(_hub_config(model.shape, dtype, pad_token_id), indent=2) + "\n")
    return folder


def match_llama(tensors: dict[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    """The tensors of a Llama under the decoder's names; whatever has no place there keeps its own."""
    found = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}
    if tied:
        found.pop("lm_head.weight", None)
    return found


def _hub_name(name: str) -> str:
    return name if name.startswith("lm_head") else PREFIX + name


def _hub_config(shape: DecoderSettings, dtype: torch.dtype, pad_token_id: int | None) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.d_vocab,
        "max_position_embeddings": shape.n_ctx,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "hidden_size": shape.d_model,
        "head_dim": shape.d_head,
        "intermediate_size": shape.d_mlp,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_theta": shape.rope_base, **_hub_scaling(shape.rope_scaling)},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": pad_token_id,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _hub_scaling(scaling: RopeScaling | None) -> dict:
    if scaling is None:
        return {"rope_type": "default"}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": int(scaling.n_ctx),
    }


def llama_shape(path: Path, config: dict) -> DecoderSettings:
    """The shape that the `config.json` at `path` describes; what a `Decoder` does not do is refused."""
    rope = {"rope_type": "default"}
    for given in (config.get("rope_parameters") or {}, config.get("rope_scaling") or {}):  # new and old spelling
        rope |= {("rope_type" if key == "type" else key): value for key, value in given.items()}
    _refuse_what_is_not_done(path, config, rope)
    heads, width = size(path, config, "num_attention_heads"), size(path, config, "hidden_size")
    kv_heads = size(path, config, "num_key_value_heads", heads)
    d_head = size(path, config, "head_dim", width // heads)
    if heads % kv_heads or d_head % 2:
        raise InputError(
            f"{path} has {heads} heads of width {d_head} on {kv_heads} key-value heads; "
            "heads must divide evenly and their width by two"
        )
    return DecoderSettings(
        n_layers=size(path, config, "num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_model=width,
        d_head=d_head,
        d_mlp=size(path, config, "intermediate_size"),
        d_vocab=size(path, config, "vocab_size"),
        n_ctx=size(path, config, "max_position_embeddings", 2048),
        eps=config.get("rms_norm_eps", 1e-6),
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rope_scaling=_scaling(path, rope),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _refuse_what_is_not_done(path: Path, config: dict, rope: dict) -> None:
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InputError(f"{path} has biases; this loader reads Llamas without them (`tl:NAME` may read this one)")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path} has hidden_act {config['hidden_act']!r}; this loader reads 'silu'")
    if config.get("quantization_config"):
        raise InputError(f"{path} is quantised; this loader reads float weights: save the model dequantised")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{path} rotates {rope['partial_rotary_factor']:g} of each head; this loader reads whole ones")


def _scaling(path: Path, rope: dict) -> RopeScaling | None:
    kind = rope["rope_type"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(
            f"{path} asks for scaled rotary positions of type {kind!r}; this loader reads 'default' and 'llama3'"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    try:
        return RopeScaling(*(float(rope[key]) for key in keys))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} asks for rotary scaling 'llama3' without {', '.join(keys)} as numbers; copy the config again"
        ) from error
