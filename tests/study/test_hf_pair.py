"""A pair whose models transformers runs goes the whole way, and says what the native decoder says of the same weights.

The toy pair's decoders are written as Qwen2 models without biases: the same function, run by another library.
"""

import dataclasses

import numpy as np
import pytest
import torch
from toy import CACHE, CORPUS, FEATURE, INTERVENE, SAE, SHAPE, toy_sae, write_toy_pair
from transformers import Qwen2Config, Qwen2ForCausalLM

from sae_steer.cache import cache_activations
from sae_steer.dictionary import Dictionary, train_sae
from sae_steer.errors import InputError
from sae_steer.findings.layer_probability import layer_probability
from sae_steer.model.decoder import Decoder
from sae_steer.model.hf.model import HFModel
from sae_steer.model.lens import to_hooked_transformer
from sae_steer.model.loading import load_decoder
from sae_steer.pair.model_pair import load_pair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.scan import scan_features
from sae_steer.selftest.run import selftest
from sae_steer.settings import LayersSettings
from sae_steer.study.of_pair import intervene

SMALL = dataclasses.replace(CORPUS, train_plans=16)
EXACT = dataclasses.replace(
    INTERVENE,
    generations=0,
    doses=(0.0, 1.0),
    onsets_per_prompt=1,
    ribbon=1,
    controls=20,
    calibration=4,
    prompts=32,
    joint_control_prompts=2,
    bootstrap_draws=200,
)


def write_qwen(decoder: Decoder, folder) -> None:
    config = Qwen2Config(
        vocab_size=SHAPE.d_vocab,
        hidden_size=SHAPE.d_model,
        intermediate_size=SHAPE.d_mlp,
        num_hidden_layers=SHAPE.n_layers,
        num_attention_heads=SHAPE.n_heads,
        num_key_value_heads=SHAPE.n_kv_heads,
        max_position_embeddings=SHAPE.n_ctx,
        rms_norm_eps=SHAPE.eps,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_base},
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    weights = {("" if name.startswith("lm_head") else "model.") + name: w for name, w in decoder.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("_proj.bias") for name in missing)
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{who runs it: the toy pair}"""
    folder = tmp_path_factory.mktemp("pairs")
    native, other = write_toy_pair(folder / "native"), write_toy_pair(folder / "other")
    for name in ("standard", "adhd"):
        decoder = load_decoder(native / name)
        for old in (other / name).iterdir():
            old.unlink()
        write_qwen(decoder, other / name)
    return {"native": load_pair(native), "transformers": load_pair(other)}


@pytest.fixture(scope="module")
def caches(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches")
    return {
        who: cache_activations(pair, layers=(2,), out=out / who, settings=CACHE, source=GeneratedTexts(SMALL))
        for who, pair in pairs.items()
    }


def of_each(pair):
    record = {"model": "adhd", "layer": 2, "model_sha256": pair.target.sha256}
    return Dictionary(toy_sae(), "adhd", 2, record, "0" * 64)


def test_the_models_are_run_by_whom_they_should_be(pairs):
    assert isinstance(pairs["native"].target.model, Decoder)
    assert isinstance(pairs["transformers"].target.model, HFModel)


def test_what_needs_weights_under_known_names_is_refused_by_name(pairs, tmp_path):
    pair = pairs["transformers"]
    for attempt in (lambda: selftest(pair, tmp_path), lambda: to_hooked_transformer(pair.target.model)):
        with pytest.raises(InputError, match=r"known names.*not a HFModel"):
            attempt()


def test_the_caches_rows_are_the_same(caches):
    for split in ("train", "confirm"):
        for model in ("standard", "adhd"):
            one, other = (np.concatenate(cache.rows(model, 2, split).maps) for cache in caches.values())
            np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


def test_the_study_finds_the_same_effects_and_reaches_the_same_verdict(pairs, caches):
    studies = [
        intervene(pair, of_each(pair), feature=FEATURE, cache=caches[who], settings=EXACT)
        for who, pair in pairs.items()
    ]
    assert all(study.tested for study in studies), studies[0].table()
    one, other = (study.trials for study in studies)
    for name in ("p_base", "p_edited"):
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)
    assert (np.abs(one["p_edited"] - one["p_base"]) > 0.01).any(), "no edit moved anything: the test says nothing"
    assert studies[0].verdict == studies[1].verdict


def test_a_dictionary_is_trained_on_its_cache_and_scanned(caches, tmp_path):
    cache = caches["transformers"]
    dictionary = train_sae(cache, model="adhd", layer=2, out=tmp_path, settings=dataclasses.replace(SAE, rows=6_400))
    scan = scan_features(cache, dictionary)
    assert scan.top(5)


def test_the_probability_after_every_block_is_the_same(pairs, caches):
    settings = LayersSettings(prompts=6, bootstrap_draws=50)
    curves = [layer_probability(pair, caches[who], settings=settings)["curves"] for who, pair in pairs.items()]
    for one, other in zip(*curves, strict=True):
        means = [[row["mean"] for row in curve["layers"]] for curve in (one, other)]
        np.testing.assert_allclose(*means, atol=1e-6)
