"""One model, three libraries, the same logits."""

import pytest
import torch
from tiny_pair import PACKAGED
from transformers import AutoModelForCausalLM

from sae_steer.corpus import write_plans
from sae_steer.model.batching import pad
from sae_steer.model.decoder import init_decoder
from sae_steer.model.language_model import fingerprint
from sae_steer.model.lens import to_hooked_transformer
from sae_steer.model.loading import load_decoder, save_decoder
from sae_steer.randomness import generator
from sae_steer.settings import PRESETS

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
deprecated = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


@pytest.fixture(scope="module")
def plans(pair):
    """Whole plans of both renderings, right-padded, and which positions are real."""
    texts = [plan.text for variant in ("standard", "adhd") for plan in write_plans("confirm", variant, count=3, seed=0)]
    ids = [pair.tokenizer.encode(text) for text in texts]
    tokens = pad(ids, pair.tokenizer.pad_id)
    return tokens, tokens != pair.tokenizer.pad_id


def test_logits_equal_transformers_llama(model, tokens, tmp_path):
    save_decoder(model, tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(model(tokens), theirs, **CLOSE)


@deprecated
def test_logits_and_residuals_equal_transformer_lens(model, tokens):
    logits, cache = to_hooked_transformer(model).run_with_cache(tokens)
    torch.testing.assert_close(model(tokens), logits, **CLOSE)
    for layer, resid in model.resid_posts(tokens, (0, 1, 3)).items():
        torch.testing.assert_close(resid, cache[f"blocks.{layer}.hook_resid_post"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["standard", "adhd"])
def test_the_packaged_models_are_the_same_in_transformers(pair, plans, name):
    tokens, real = plans
    theirs = AutoModelForCausalLM.from_pretrained(PACKAGED / name, dtype=torch.float32)
    mask = {"attention_mask": real.long()}
    torch.testing.assert_close(pair.model(name).model(tokens)[real], theirs(tokens, **mask).logits[real], **CLOSE)


@deprecated
@torch.no_grad()
@pytest.mark.parametrize("name", ["standard", "adhd"])
def test_the_packaged_models_are_the_same_in_transformer_lens(pair, plans, name):
    tokens, real = plans
    ours = pair.model(name).model
    logits, cache = to_hooked_transformer(ours).run_with_cache(tokens)
    torch.testing.assert_close(ours(tokens)[real], logits[real], **CLOSE)
    for layer, resid in ours.resid_posts(tokens, tuple(range(ours.shape.n_layers))).items():
        torch.testing.assert_close(resid[real], cache[f"blocks.{layer}.hook_resid_post"][real], **CLOSE)


def test_a_saved_model_loads_unchanged(model, tmp_path):
    loaded = load_decoder(save_decoder(model, tmp_path, dtype=torch.float32))
    assert loaded.shape == model.shape
    assert fingerprint(loaded) == fingerprint(model)


def test_presets_have_the_released_sizes():
    assert init_decoder(PRESETS["interpgpt-23m"], generator(0)).n_parameters == 23_471_104
    assert init_decoder(PRESETS["small"], generator(0)).n_parameters == 1_411_328
