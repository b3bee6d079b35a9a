"""Decoders on disk: a Hugging Face Llama folder (`config.json`, `model.safetensors`), read and written.

What is read must fit exactly: a missing, extra or misshapen tensor is an error that lists the names.
Nothing is unpickled and no code of the folder runs.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_steer.errors import InputError
from sae_steer.model.decoder import Decoder
from sae_steer.runtime import replacing, write_text
from sae_steer.settings import DecoderSettings

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


def load_decoder(folder: Path) -> Decoder:
    """The decoder of a Hugging Face Llama folder, in float32, ready to read (`eval`, no gradients)."""
    folder = Path(folder)
    model = Decoder(_read_shape(folder))
    found = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in _read_weights(folder).items()
        if not name.endswith(IGNORED)
    }
    if model.shape.tied:
        found.pop("lm_head.weight", None)
    _check_fit(folder, {name: tuple(t.shape) for name, t in model.state_dict().items()}, found)
    model.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    return model.eval().requires_grad_(False)


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
        "rope_parameters": {"rope_theta": shape.rope_base, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": pad_token_id,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _read_shape(folder: Path) -> DecoderSettings:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json; give a Hugging Face Llama folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise InputError(f"{path} has model_type {kind!r}; this loader reads 'llama'")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if {found.get(key, "default") for found in (rope, scaling) for key in ("rope_type", "type")} != {"default"}:
        raise InputError(f"{path} asks for scaled rotary positions; this loader reads unscaled ones")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InputError(f"{path} has biases; this loader reads Llamas without them")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path} has hidden_act {config['hidden_act']!r}; this loader reads 'silu'")
    return DecoderSettings(
        **_sizes(path, config),
        n_ctx=config.get("max_position_embeddings", 2048),
        eps=config.get("rms_norm_eps", 1e-6),
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _sizes(path: Path, config: dict) -> dict[str, int]:
    """Counts and widths, which must be positive integers that divide as heads do."""

    def size(name: str, otherwise: int | None = None) -> int:
        found = config.get(name) or otherwise
        if found is None:
            raise InputError(f"{path} has no {name!r}; it is not a whole Llama config")
        if not isinstance(found, int) or found < 1:
            raise InputError(f"{path} has {name} {found!r}, which is no positive integer; copy it again")
        return found

    heads, width = size("num_attention_heads"), size("hidden_size")
    kv_heads, d_head = size("num_key_value_heads", heads), size("head_dim", width // heads)
    if heads % kv_heads or d_head % 2:
        raise InputError(
            f"{path} has {heads} heads of width {d_head} on {kv_heads} key-value heads; "
            "heads must divide evenly and their width by two"
        )
    return {
        "n_layers": size("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "d_model": width,
        "d_head": d_head,
        "d_mlp": size("intermediate_size"),
        "d_vocab": size("vocab_size"),
    }


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    index, pickles = folder / "model.safetensors.index.json", sorted(folder.glob("*.bin"))
    if pickles and not index.is_file() and not (folder / "model.safetensors").is_file():
        raise InputError(
            f"{folder} has its weights in {pickles[0].name} alone, a pickle, which can run code and is not read; "
            "save the model as safetensors"
        )
    try:
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            shards = ["model.safetensors"]
        return {name: tensor for shard in shards for name, tensor in load_file(folder / Path(shard).name).items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} has no whole model.safetensors ({error}); copy the folder again") from error


def _check_fit(folder: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, torch.Tensor]) -> None:
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    wrong = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in (("missing", missing), ("not known", extra), ("misshapen", misshapen))
        if names
    ]
    if wrong:
        raise InputError(f"the weights in {folder} do not fit its config.json ({'; '.join(wrong)}); copy both again")
