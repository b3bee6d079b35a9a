"""On a GPU: the same caches, effects and verdicts as on a CPU, to the precision of a sum."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import CACHE, CORPUS, FEATURE, INTERVENE

import sae_steer as ss
from sae_steer.atlas.atlas import make_atlas
from sae_steer.cache import cache_activations
from sae_steer.effects.splicing import ce_recovered
from sae_steer.findings.layer_probability import layer_probability
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.settings import AtlasSettings, LayersSettings
from sae_steer.study.of_pair import intervene
from sae_steer.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture(scope="module")
def gpu_pair(toy_pair):
    return deepcopy(toy_pair).to("cuda")


def numbers(record) -> list[float]:
    """Every float of a record, in order."""
    if isinstance(record, dict):
        return [number for key, part in record.items() if key != "provenance" for number in numbers(part)]
    if isinstance(record, list):
        return [number for part in record for number in numbers(part)]
    return [record] if isinstance(record, float) else []


def test_a_cache_made_on_a_gpu_holds_the_rows_of_one_made_on_a_cpu(toy_pair, toy_cache, tmp_path):
    world = World.local(precision="float32", device="cuda")
    made = cache_activations(
        toy_pair, layers=(1, 2), out=tmp_path, settings=CACHE, source=GeneratedTexts(CORPUS), world=world
    )
    for layer in (1, 2):
        ours, theirs = (one.rows("adhd", layer, "confirm").take(np.arange(200)) for one in (made, toy_cache))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_a_study_on_a_gpu_has_the_effects_and_verdicts_of_one_on_a_cpu(toy_pair, gpu_pair, toy_cache, toy_dictionary):
    settings = replace(INTERVENE, generations=4)
    cpu, gpu = (
        intervene(pair, toy_dictionary, feature=FEATURE, cache=toy_cache, settings=settings).record()
        for pair in (toy_pair, gpu_pair)
    )
    assert gpu["verdict"] == cpu["verdict"]
    for ours, theirs in zip(gpu["variants"], cpu["variants"], strict=True):
        assert ours["verdict"] == theirs["verdict"]
        for mode in ("single", "joint"):
            np.testing.assert_allclose(numbers(ours[mode]["doses"]), numbers(theirs[mode]["doses"]), atol=1e-4)


def test_an_atlas_on_a_gpu_has_the_effects_of_one_on_a_cpu(toy_pair, gpu_pair, toy_cache, toy_dictionary):
    settings = AtlasSettings(
        prompts=36, onsets_per_prompt=2, bootstrap_draws=200, null_draws=600, null_onsets=24, ablation_onsets=3, norms=3
    )
    known = {"features": (2, 5, FEATURE), "alive": np.arange(24), "log_odds": np.zeros(24), "settings": settings}
    cpu, gpu = (make_atlas(pair, toy_dictionary, cache=toy_cache, **known) for pair in (toy_pair, gpu_pair))
    assert cpu.table.keys() == gpu.table.keys()
    for name, column in cpu.table.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(gpu.table[name], column, rtol=2e-2, atol=1e-4, err_msg=name)


def test_models_and_dictionary_in_memory_may_lie_apart(toy_pair, gpu_pair, toy_dictionary):
    random = torch.Generator().manual_seed(2)
    tokens, marked = torch.randint(10, 900, (64, 24), generator=random), torch.zeros(64, 24, dtype=torch.bool)
    marked[:, [5, 11, 17]] = True
    ids = sorted({toy_pair.tokenizer.encode(phrase)[0] for phrase in toy_pair.phrases})
    settings = replace(INTERVENE, generations=0, min_firings=1)
    found = [
        ss.intervene(
            [model.model for model in pair.models],
            toy_dictionary.sae,
            feature=FEATURE,
            layer=2,
            tokens=tokens,
            positions=marked,
            measure=ids,
            settings=settings,
        )
        for pair in (toy_pair, gpu_pair)
    ]
    assert found[0].verdict == found[1].verdict


def test_layer_curves_and_spliced_losses_agree(toy_pair, gpu_pair, toy_cache, toy_dictionary):
    settings = LayersSettings(prompts=6, bootstrap_draws=200)
    cpu, gpu = (numbers(layer_probability(pair, toy_cache, settings=settings)) for pair in (toy_pair, gpu_pair))
    np.testing.assert_allclose(gpu, cpu, atol=1e-4)
    texts = toy_cache.own_texts("scan", "adhd")[:10]
    losses = [
        ce_recovered(
            pair.target.model, toy_dictionary.to(pair.target.model.device).sae, texts, 2, only_onsets=True
        ).spliced
        for pair in (toy_pair, gpu_pair)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
