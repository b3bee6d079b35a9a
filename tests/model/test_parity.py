"""One model, three libraries, the same logits."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_steer.model.decoder import init_decoder
from sae_steer.model.lens import to_hooked_transformer
from sae_steer.model.loading import fingerprint, load_decoder, save_decoder
from sae_steer.runtime import generator
from sae_steer.settings import PRESETS

TINY = dataclasses.replace(PRESETS["small"], n_layers=2, d_vocab=64, d_mlp=96)
SHAPES = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tied=False),
    "grouped queries": dataclasses.replace(TINY, n_kv_heads=2, rope_base=500_000.0),
}


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def model(request):
    model = init_decoder(SHAPES[request.param], generator(1)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.mul_(6.0) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5, generator=generator(2))
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (3, 40), generator=generator(3))


def test_logits_equal_transformers_llama(model, tokens, tmp_path):
    save_decoder(model, tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(model(tokens), theirs, atol=1e-4, rtol=1e-4)


def test_logits_and_residuals_equal_transformer_lens(model, tokens):
    logits, cache = to_hooked_transformer(model).run_with_cache(tokens)
    torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=1e-4)
    resid = model.resid_posts(tokens, (0, 1))[1]
    torch.testing.assert_close(resid, cache["blocks.1.hook_resid_post"], atol=1e-4, rtol=1e-4)


def test_a_saved_model_loads_unchanged(model, tmp_path):
    loaded = load_decoder(save_decoder(model, tmp_path, dtype=torch.float32))
    assert loaded.shape == model.shape
    assert fingerprint(loaded) == fingerprint(model)


def test_presets_have_the_released_sizes():
    assert init_decoder(PRESETS["interpgpt-23m"], generator(0)).n_parameters == 23_471_104
    assert init_decoder(PRESETS["small"], generator(0)).n_parameters == 1_411_328
