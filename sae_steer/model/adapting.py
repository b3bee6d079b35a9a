"""An object in memory as a model of a pair, whoever runs it."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from sae_steer.errors import InputError, NotNativeError
from sae_steer.model.decoder import Decoder
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.loading import load_decoder
from sae_steer.randomness import Stream, generator

TOKENS, SHARE = 32, 1e-3
"""Read by a Llama and by the decoder made of it, and how far their logits may part, as a share of the largest."""


def adapt(model: Any) -> LanguageModel:
    """`model` itself if it is one; else around a `transformers` model, a `HookedTransformer` or a `TransformerBridge`.

    A Llama that the native decoder computes becomes one. Anything else is an `InputError`.
    """
    if isinstance(model, LanguageModel):
        return model
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "HookedTransformer" in kinds:
        from sae_steer.model.lens import LensModel

        return LensModel(model)
    if "TransformerBridge" in kinds:
        return _run_by_transformers(model.original_model)  # what the bridge hooks into
    if "PreTrainedModel" in kinds:
        return _native(model) or _run_by_transformers(model)
    raise InputError(
        f"a {type(model).__name__} cannot be a model of a pair; give a Decoder, a causal language model of "
        "transformers, a HookedTransformer or a TransformerBridge"
    )


def _run_by_transformers(model: Any) -> LanguageModel:
    from sae_steer.model.hf.loading import adapt_hf

    return adapt_hf(model)


def _native(model: Any) -> Decoder | None:
    """A Llama as a decoder, through its own files; None if it is none, or computes something else, hooked as it is."""
    if model.config.model_type != "llama" or model.dtype != torch.float32:
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, safe_serialization=True)
        try:
            decoder = load_decoder(Path(folder)).to(model.device)
        except NotNativeError:
            return None
    tokens = torch.randint(0, decoder.shape.d_vocab, (1, TOKENS), generator=generator(0, Stream.PROBE_TOKENS)).to(
        model.device
    )
    with torch.no_grad():
        theirs, ours = model.eval()(tokens).logits, decoder(tokens)
    return decoder if (ours - theirs).abs().max() <= SHARE * theirs.abs().max() else None
