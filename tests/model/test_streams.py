"""Streams read by fused weights are the decoder's own, to the arithmetic at float32 and faithfully at bfloat16."""

from dataclasses import replace

import pytest
import torch
from tiny_pair import SHAPE, lively

from sae_steer.errors import InputError
from sae_steer.model.batching import pad
from sae_steer.model.decoder import Decoder
from sae_steer.model.streams import stream_reader
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.settings import CorpusSettings
from sae_steer.world import World


@pytest.fixture(scope="module")
def tokens(pair):
    texts = GeneratedTexts(CorpusSettings(train_plans=10)).texts(pair, "train")
    return [text.token.tolist() for text in texts]


def real(model: Decoder, tokens: list[list[int]], layers: tuple[int, ...], precision: str):
    """(read, computed by the decoder) rows of every layer, padding left out."""
    padded = pad(tokens, 0)
    kept = torch.arange(padded.shape[1]) < torch.tensor([len(text) for text in tokens])[:, None]
    read = stream_reader(model, layers, World.local(precision=precision, device="cpu"))(padded)
    assert set(read) == set(layers)
    own = model.resid_posts(padded, layers)
    return [(read[layer][kept], own[layer][kept]) for layer in layers]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_at_float32_they_are_the_decoders_own(tokens, kv_heads):
    model = lively(replace(SHAPE, n_kv_heads=kv_heads, rope_base=50_000.0), 3)
    for read, own in real(model, tokens, (0, 2), "float32"):
        torch.testing.assert_close(read, own, rtol=1e-5, atol=1e-5)


def test_at_bfloat16_they_are_faithful_on_the_embedded_pair(pair, tokens):
    for model in pair.models:
        ((read, own),) = real(model.model, tokens, (2,), "bfloat16")
        assert read.dtype == torch.float32
        assert (read - own).norm() / own.norm() <= 0.01
        assert ((read - own).abs().amax(1) / own.square().mean(1).sqrt()).max() <= 0.05


def test_a_layer_that_is_not_there_is_refused(pair):
    with pytest.raises(InputError, match="layers 0 to 5"):
        stream_reader(pair.target.model, (6,), World.local(device="cpu"))
