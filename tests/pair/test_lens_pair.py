"""A pair of TransformerLens models goes through the same cache, by its own forward."""

from dataclasses import replace

import pytest
import torch
from lens_models import gpt2_like

from sae_steer.cache import cache_activations
from sae_steer.findings.layer_probability import layer_probability
from sae_steer.pair.model_pair import NamedModel
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.settings import CacheSettings, CorpusSettings, LayersSettings

CORPUS = CorpusSettings(train_plans=12, scan_plans=3, tune_plans=2, confirm_plans=4)


@pytest.fixture(scope="module")
def lens_pair(tiny):
    """Two GPT-2-like models of different depth, one of them with further rows."""
    base = NamedModel.of("base", gpt2_like(seed=0))
    tuned = NamedModel.of("tuned", gpt2_like(seed=1, n_layers=2, d_vocab=1040))
    return replace(tiny, name="lens", reference=base, target=tuned)


@torch.no_grad()
def test_the_cache_holds_what_run_with_cache_gives(lens_pair, tmp_path):
    settings = CacheSettings(dtype="float32", precision="float32", rows_per_shard=2_048)
    cache = cache_activations(
        lens_pair, layers=[0, 1], out=tmp_path / "cache", settings=settings, source=GeneratedTexts(CORPUS)
    )
    cache.check_pair(lens_pair)
    assert cache.verify() == []
    for model in lens_pair.models:
        stored = torch.cat(list(cache.rows(model.name, 1, "scan").in_order()))
        start = 0
        for text in cache.texts("scan"):
            _, theirs = model.model.hooked.run_with_cache(torch.from_numpy(text.token)[None].long())
            here = stored[start : start + len(text)]
            torch.testing.assert_close(here, theirs["blocks.1.hook_resid_post"][0], atol=1e-4, rtol=1e-4)
            start += len(text)
        assert start == len(stored)
    curves = layer_probability(lens_pair, cache, settings=LayersSettings(prompts=3, bootstrap_draws=20))["curves"]
    assert {curve["model"]: len(curve["layers"]) for curve in curves} == {"base": 3, "tuned": 2}
