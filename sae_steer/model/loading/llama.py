"""A decoder written as a Hugging Face Llama folder. `llama_config` and `llama_tensors` read one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sae_steer.files import replacing, write_text
from sae_steer.model.decoder import Decoder
from sae_steer.settings import DecoderSettings, RopeScaling

PREFIX = "model."


def save_decoder(model: Decoder, folder: Path, *, dtype: torch.dtype, pad_token_id: int | None = None) -> Path:
    """Write `model` so that `AutoModelForCausalLM.from_pretrained(folder)` reads it; returns `folder`."""
    folder = Path(folder)
    tensors = {_hub_name(name): tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as scratch:
        save_file(tensors, scratch, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(_hub_config(model.shape, dtype, pad_token_id), indent=2) + "\n")
    return folder


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
