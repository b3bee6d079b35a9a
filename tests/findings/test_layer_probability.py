"""P(target) over the layers: the last of them is what the model says itself."""

import dataclasses

import numpy as np
import pytest
import torch

from sae_steer import stats
from sae_steer.errors import InputError
from sae_steer.findings import tuned_lens
from sae_steer.findings.layer_patching import Depth, Patched, patch_by_layer
from sae_steer.findings.layer_probability import layer_probability, onset_masses
from sae_steer.findings.tuned_lens import fit_tuned_lens
from sae_steer.model import rows
from sae_steer.model.decoder import Rope, causal
from sae_steer.model.parts import read_parts
from sae_steer.progress import silent
from sae_steer.settings import LayersSettings

TARGET = (366, 417, 431)
SETTINGS = LayersSettings(prompts=6, fit_prompts=8, patch_prompts=4, bootstrap_draws=300)


@pytest.fixture(scope="module")
def texts(cache):
    return cache.own_texts("confirm", "adhd")[:4]


@pytest.fixture(scope="module")
def made(pair, cache):
    """The record, and the progress that was told."""
    told = []
    found = layer_probability(
        pair, cache, settings=SETTINGS, on_step=lambda done, total, note="": told.append((done, total))
    )
    return found, told


@pytest.fixture(scope="module")
def record(made):
    return made[0]


def by_task(found):
    """Rows in an order that does not depend on batches."""
    return found.after[np.lexsort((found.after[:, 0], found.task))]


def test_the_last_layer_is_the_models_own_output(pair, texts):
    model = pair.target.model
    found = onset_masses(model, texts, TARGET)
    masses, task = found.after, found.task
    own = []
    for text in texts:
        logits = model(torch.from_numpy(text.token.astype(np.int64))[None])[0]
        own.append(logits[text.is_onset].double().softmax(-1)[:, list(TARGET)].sum(-1))
    assert masses.shape == (sum(text.is_onset.sum() for text in texts), model.shape.n_layers)
    np.testing.assert_allclose(np.sort(masses[:, -1]), np.sort(torch.cat(own).numpy()), atol=1e-6)
    assert sorted(task) == sorted(np.repeat([text.task for text in texts], [text.is_onset.sum() for text in texts]))


def test_masses_do_not_depend_on_how_texts_are_batched(pair, texts, monkeypatch):
    together = by_task(onset_masses(pair.reference.model, texts, TARGET))
    monkeypatch.setattr(rows, "TOKENS_PER_BATCH", 1)
    np.testing.assert_allclose(by_task(onset_masses(pair.reference.model, texts, TARGET)), together, atol=1e-6)


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
    found = onset_masses(pair.target.model, chosen, cache.target_tokens(pair).ids)
    again = stats.cluster_bootstrap(found.after, found.task, draws=300, seed=0)
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


def test_progress_never_goes_back_and_ends_with_all_done(made):
    _, told = made
    assert told == sorted(told)
    assert told[-1] == (10, 10)


def test_attention_and_mlp_of_a_block_make_its_jump_and_jumps_make_the_curve(record):
    for curve in record["curves"]:
        below = None
        for row in curve["layers"]:
            assert row["attention"]["mean"] + row["mlp"]["mean"] == pytest.approx(row["jump"]["mean"], abs=1e-9)
            if below is not None:
                assert row["jump"]["mean"] == pytest.approx(row["mean"] - below, abs=1e-6)
                assert row["ratio"]["mean"] == pytest.approx(row["mean"] / below, rel=1e-3)
            below = row["mean"]


@torch.no_grad()
def test_the_stream_between_attention_and_mlp_is_the_blocks_own(pair, texts):
    model, tokens = pair.target.model, torch.from_numpy(texts[0].token.astype(np.int64))[None]
    resid, rope = model.embed(tokens), Rope.at(torch.arange(tokens.shape[1]), model.shape)
    for block, seen in zip(model.layers, read_parts(model, tokens), strict=True):
        between = resid + block.self_attn(block.input_layernorm(resid), rope, causal)
        torch.testing.assert_close(seen.before, resid, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen.between, between, rtol=1e-4, atol=1e-4)
        resid = block(resid, rope, causal)
        torch.testing.assert_close(seen.after, resid, rtol=1e-4, atol=1e-4)


def test_the_tuned_lens_of_the_last_block_is_the_models_own_output(record, pair):
    for curve in record["curves"]:
        last = curve["layers"][-1]
        assert last["tuned"]["mean"] == pytest.approx(last["mean"])
    for name in ("standard", "adhd"):
        maps = record["tuned_lens"][name]
        assert [one["layer"] for one in maps] == list(range(pair.target.model.shape.n_layers - 1))
        assert maps[-1]["r2"] > maps[0]["r2"], "the last blocks are nearer to the last"


def test_maps_of_a_wide_model_are_read_in_parts_to_the_same_lens(pair, cache, monkeypatch):
    texts = cache.texts("train")[:40], cache.texts("scan")[:10]
    whole = fit_tuned_lens(pair.target.model, *texts)
    assert whole.maps[0].r2 > whole.maps[0].identity_r2 + 0.05, "what the logit lens lacks"
    monkeypatch.setattr(tuned_lens, "AT_ONCE", 1)
    for one, other in zip(whole.maps, fit_tuned_lens(pair.target.model, *texts).maps, strict=True):
        torch.testing.assert_close(one.carry.weight, other.carry.weight, rtol=1e-3, atol=1e-4)


def test_the_ceiling_is_the_grammars_own_probability_at_the_same_onsets(record, cache):
    for curve in record["curves"]:
        variant = cache.variants.index(curve["rendering"])
        chosen = [text for text in cache.texts("confirm") if text.rendering == variant][: SETTINGS.prompts]
        expected = np.concatenate([text.true_p[text.is_onset] for text in chosen]).mean()
        assert curve["ceiling"]["mean"] == pytest.approx(expected, abs=1e-6)
    assert record["curves"][-1]["ceiling"]["mean"] > 0.2, "adhd text"


def test_both_models_get_the_others_stream_after_every_block_by_every_map(record, pair):
    patched = record["patching"]["patched"]
    layers = pair.target.model.shape.n_layers
    assert {(row["layer"], row["giver"], row["flavour"]) for row in patched} == {
        (layer, giver, flavour)
        for layer in range(layers)
        for giver in ("standard", "adhd")
        for flavour in ("raw", "rotated", "affine")
    }
    last = [row for row in patched if row["layer"] == layers - 1 and row["flavour"] == "raw"]
    assert max(row["share"] for row in last) > 0.5, "only the unembedding is the receiver's own"
    assert layers - 1 in record["patching"]["movable"]
    for row in patched:
        assert row["share_low"] is None or row["share_low"] <= row["share"] <= row["share_high"]


@torch.no_grad()
def test_a_raw_patch_is_the_hand_made_one(pair, texts):
    fit = texts[2:]
    target = TARGET
    depth = patch_by_layer(pair, texts, fit, target, draws=100, seed=0, on_step=silent)
    change, gap = 0.0, 0.0
    for text in texts:
        tokens = torch.from_numpy(text.token.astype(np.int64))[None]
        own, theirs = (model.model.resid_posts(tokens, (1,))[1] for model in (pair.reference, pair.target))
        patched = own.clone()
        patched[0, text.is_onset] = theirs[0, text.is_onset]
        model, onset = pair.reference.model, text.is_onset

        def mass(logits, onset=onset):
            return logits[0, onset].double().softmax(-1)[:, list(TARGET)].sum()

        change += mass(model.unembed(model.run(patched, start=2))) - mass(model(tokens))
        gap += mass(pair.target.model(tokens)) - mass(model(tokens))
    found = next(p for p in depth.patched if (p.layer, p.giver, p.flavour) == (1, "adhd", "raw"))
    assert found.share == pytest.approx(float(change / gap), abs=1e-4)


def test_a_layer_that_cannot_be_moved_is_warned_of():
    rows = [Patched(layer, "adhd", "standard", "raw", share, share - 0.04, share + 0.04, 0.1) for layer, share in
            ((0, 0.01), (1, 0.5), (2, 0.8))]  # fmt: skip
    depth = Depth(tuple(rows), 10, 5)
    assert depth.movable == [1, 2]
    assert depth.sentence(1) == depth.sentence()
    assert "WARNING: layer 0, which is studied, is not among them" in depth.sentence(0)


def test_two_equal_models_have_nothing_to_move(pair, texts):
    same = dataclasses.replace(pair, reference=dataclasses.replace(pair.target, name="standard"))
    depth = patch_by_layer(same, texts, texts, TARGET, draws=10, seed=0, on_step=silent)
    assert (depth.patched, depth.movable) == ((), [])
    assert "nothing to move" in depth.sentence(2)
