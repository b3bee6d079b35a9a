"""P(target) over the layers: the last of them is what the model says itself."""

import dataclasses

import numpy as np
import pytest
import torch

from sae_steer import stats
from sae_steer.errors import InputError
from sae_steer.findings.layer_probability import layer_probability, onset_masses
from sae_steer.model import rows
from sae_steer.settings import LayersSettings

TARGET = (366, 417, 431)
SETTINGS = LayersSettings(prompts=6, bootstrap_draws=300)


@pytest.fixture(scope="module")
def texts(cache):
    return cache.own_texts("confirm", "adhd")[:4]


@pytest.fixture(scope="module")
def record(pair, cache):
    return layer_probability(pair, cache, settings=SETTINGS)


def by_task(masses, task):
    """Rows in an order that does not depend on batches."""
    return masses[np.lexsort((masses[:, 0], task))]


def test_the_last_layer_is_the_models_own_output(pair, texts):
    model = pair.target.model
    masses, task = onset_masses(model, texts, TARGET)
    own = []
    for text in texts:
        logits = model(torch.from_numpy(text.token.astype(np.int64))[None])[0]
        own.append(logits[text.is_onset].double().softmax(-1)[:, list(TARGET)].sum(-1))
    assert masses.shape == (sum(text.is_onset.sum() for text in texts), model.shape.n_layers)
    np.testing.assert_allclose(np.sort(masses[:, -1]), np.sort(torch.cat(own).numpy()), atol=1e-6)
    assert sorted(task) == sorted(np.repeat([text.task for text in texts], [text.is_onset.sum() for text in texts]))


def test_masses_do_not_depend_on_how_texts_are_batched(pair, texts, monkeypatch):
    together = by_task(*onset_masses(pair.reference.model, texts, TARGET))
    monkeypatch.setattr(rows, "TOKENS_PER_BATCH", 1)
    np.testing.assert_allclose(by_task(*onset_masses(pair.reference.model, texts, TARGET)), together, atol=1e-6)


def test_there_is_a_curve_for_each_model_on_each_rendering(record, pair, cache):
    curves = record["curves"]
    assert [(curve["model"], curve["rendering"]) for curve in curves] == [
        (model, rendering) for model in ("standard", "adhd") for rendering in cache.variants
    ]
    for curve in curves:
        assert [row["layer"] for row in curve["layers"]] == list(range(pair.target.model.shape.n_layers))
        for row in curve["layers"]:
            assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1
    assert record["target_tokens"]["ids"] == list(cache.target_tokens(pair).ids)
    assert len(record["target_tokens"]["tokens"]) == len(record["target_tokens"]["ids"])


def test_both_models_read_the_same_onsets_and_tasks_are_the_clusters(record, cache, pair):
    sizes = {(curve["rendering"], curve["n"], curve["tasks"]) for curve in record["curves"]}
    assert len(sizes) == len(cache.variants)
    chosen = [text for text in cache.texts("confirm") if text.rendering == cache.variants.index("adhd")][:6]
    curve = record["curves"][-1]
    assert curve["n"] == sum(int(text.is_onset.sum()) for text in chosen)
    assert curve["tasks"] == len({text.task for text in chosen})
    masses, task = onset_masses(pair.target.model, chosen, cache.target_tokens(pair).ids)
    again = stats.cluster_bootstrap(masses, task, draws=300, seed=0)
    assert [row["mean"] for row in curve["layers"]] == pytest.approx(again.mean.tolist())
    assert [row["low"] for row in curve["layers"]] == pytest.approx(again.low.tolist())


def test_the_same_seed_gives_the_same_record(record, pair, cache):
    assert layer_probability(pair, cache, settings=SETTINGS) == record


def test_a_cache_of_another_pair_is_refused(pair, cache):
    other = dataclasses.replace(pair, phrases=(*pair.phrases, "Another one"))
    with pytest.raises(InputError, match="was written from another pair"):
        layer_probability(other, cache, settings=SETTINGS)


def test_texts_of_one_task_are_refused_in_one_line(pair, cache):
    with pytest.raises(InputError, match="are all of one task, and intervals over tasks need 2 or more"):
        layer_probability(pair, cache, settings=LayersSettings(prompts=1))


def test_progress_ends_with_all_readings_done(pair, cache):
    told = []
    layer_probability(pair, cache, settings=SETTINGS, on_step=lambda done, total, note="": told.append((done, total)))
    assert told == [(done, 4) for done in range(5)]
