"""The configs of InterpGPT releases and of TransformerLens bundles, as the shape of a decoder."""

from pathlib import Path

from sae_steer.errors import InputError
from sae_steer.model.loading.sizes import size
from sae_steer.settings import DecoderSettings

MULTIPLE = 64
"""To which the release rounds the width of its MLPs up."""


def interpgpt_shape(path: Path, config: dict) -> DecoderSettings:
    """The shape of a release's `config.json`. Its `d_ff` is nominal: d_mlp = 2/3 of it, rounded up to 64."""
    if config.get("bias"):
        raise InputError(f"{path} has biases; InterpGPT models have none")
    heads, width = size(path, config, "n_heads"), size(path, config, "d_model")
    d_mlp = config.get("d_mlp") or -(-(2 * size(path, config, "d_ff") // 3) // MULTIPLE) * MULTIPLE
    return _checked(
        path,
        DecoderSettings(
            n_layers=size(path, config, "n_layers"),
            n_heads=heads,
            n_kv_heads=size(path, config, "n_kv_heads", heads),
            d_model=width,
            d_head=size(path, config, "d_head", width // heads),
            d_mlp=d_mlp,
            d_vocab=size(path, config, "vocab_size"),
            n_ctx=size(path, config, "max_seq_len"),
            eps=float(config.get("rms_norm_eps", config.get("norm_eps", 1e-6))),
            rope_base=float(config.get("rope_theta", config.get("rope_base", 10_000.0))),
            tied=bool(config.get("tie_word_embeddings", True)),
        ),
    )


def hooked_shape(path: Path, config: dict) -> DecoderSettings:
    """The shape of a TransformerLens config that a bundle holds; one that is no Llama is refused."""
    wanted = {
        "act_fn": "silu",
        "normalization_type": "RMS",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": config.get("d_head"),
        "attention_dir": "causal",
    }
    other = [f"{key} {config[key]!r}" for key, value in wanted.items() if config.get(key, value) != value]
    if other:
        raise InputError(
            f"the config in {path} has {', '.join(other)}, which is no Llama; build a HookedTransformer of it, and "
            "make the pair in memory"
        )
    heads = size(path, config, "n_heads")
    return _checked(
        path,
        DecoderSettings(
            n_layers=size(path, config, "n_layers"),
            n_heads=heads,
            n_kv_heads=size(path, config, "n_key_value_heads", heads),
            d_model=size(path, config, "d_model"),
            d_head=size(path, config, "d_head"),
            d_mlp=size(path, config, "d_mlp"),
            d_vocab=size(path, config, "d_vocab"),
            n_ctx=size(path, config, "n_ctx"),
            eps=float(config.get("eps", 1e-6)),
            rope_base=float(config.get("rotary_base", 10_000.0)),
            tied=True,
        ),
    )


def _checked(path: Path, shape: DecoderSettings) -> DecoderSettings:
    if shape.n_heads % shape.n_kv_heads or shape.d_head % 2:
        raise InputError(
            f"{path} has {shape.n_heads} heads of width {shape.d_head} on {shape.n_kv_heads} key-value heads; "
            "heads must divide evenly and their width by two"
        )
    return shape
