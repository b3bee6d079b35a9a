"""Replayed readings against whole forward passes with hooks, one onset at a time."""

import numpy as np
import pytest
import torch
from toy import CAUSE, FEATURE, SHAPE

from sae_steer.edits.controls import isotropic
from sae_steer.edits.edit import Control, Donor, Fan, Inject, Patch, ZeroAblate
from sae_steer.effects.measure import FanRequest, OnsetRows, Request, read, unedited
from sae_steer.model import rows
from sae_steer.model.readout import TargetMass
from sae_steer.randomness import generator

TARGET = (366, 417, 431)
MASS = TargetMass(TARGET)


@pytest.fixture(scope="module")
def texts(cache):
    return cache.own_texts("confirm", "adhd")[:3]


@pytest.fixture(scope="module")
def chosen(texts):
    """Different numbers of onsets a text, so that rows are padded."""
    return [np.flatnonzero(text.is_onset)[1 : 3 + number] for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def onsets(texts, chosen):
    return OnsetRows.of(texts, chosen)


@pytest.fixture(scope="module")
def edits(dictionary, scan):
    """One of each kind, large enough to be seen."""
    feature = int(scan.target_rate.argmax())
    direction = dictionary.sae.direction(feature)
    return {"inject": Inject(direction, 20.0), "zero_ablate": ZeroAblate(dictionary.sae, feature)}


def with_hook(model, layer, tokens, positions, edit):
    """Target mass at `positions` of one text whose stream after `layer` is edited there, by a hook of our own."""

    def apply(module, inputs, resid):
        resid = resid.clone()
        resid[:, positions] = edit(resid[:, positions])
        return resid

    handle = model.layers[layer].register_forward_hook(apply)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64))[None])
    handle.remove()
    return logits[0, positions].double().softmax(-1)[:, list(TARGET)].sum(-1).numpy()


def by_row(onsets, texts, chosen, find):
    """`find(text, position)` for every row, in the rows' own order."""
    text = {text.prompt: (text, positions) for text, positions in zip(texts, chosen, strict=True)}
    return np.array([find(*text[prompt], at) for prompt, at in zip(onsets.prompt, onsets.position, strict=True)])


@pytest.mark.parametrize("layer", [1, 2], ids=["upstream", "at the dictionary's layer"])
@pytest.mark.parametrize("kind", ["inject", "zero_ablate"])
def test_a_single_edit_reads_as_a_whole_forward_pass_with_a_hook(pair, texts, chosen, onsets, edits, kind, layer):
    model, edit = pair.target.model, edits[kind]
    found = read(model, layer, [Request(onsets, [unedited, edit])], MASS)[0]
    whole = by_row(onsets, texts, chosen, lambda text, _, at: with_hook(model, layer, text.token, [at], edit)[0])
    np.testing.assert_allclose(found.value[:, 1], whole, atol=1e-6, rtol=1e-4)
    assert np.abs(found.value[:, 1] - found.value[:, 0]).max() > 1e-6


@pytest.mark.parametrize("kind", ["inject", "zero_ablate"])
def test_a_joint_edit_reads_as_a_whole_forward_pass_with_a_hook(pair, texts, chosen, onsets, edits, kind):
    model, edit = pair.target.model, edits[kind]
    found = read(model, 2, [Request(onsets, [edit], joint=True)], MASS)[0]
    whole = by_row(
        onsets,
        texts,
        chosen,
        lambda text, together, at: with_hook(model, 2, text.token, together, edit)[list(together).index(at)],
    )
    np.testing.assert_allclose(found.value[:, 0], whole, atol=1e-6, rtol=1e-4)


def test_editing_the_only_chosen_onset_jointly_is_editing_it_alone(pair, texts, edits):
    onsets = OnsetRows.of(texts, [np.flatnonzero(text.is_onset)[2:3] for text in texts])
    single, joint = (
        read(pair.target.model, 2, [Request(onsets, [edits["inject"]], joint=joint)], MASS)[0]
        for joint in (False, True)
    )
    np.testing.assert_allclose(single.value, joint.value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("joint", [False, True])
def test_dose_zero_equals_the_baseline_bit_for_bit(pair, onsets, edits, joint):
    nothing = [Inject(edits["inject"].direction, 0.0), ZeroAblate(edits["zero_ablate"].sae, 0, 0.0)]
    found = read(pair.target.model, 2, [Request(onsets, [unedited, *nothing], joint=joint)], MASS)[0]
    assert np.array_equal(found.value[:, 0], found.value[:, 1])
    assert np.array_equal(found.value[:, 0], found.value[:, 2])
    assert not found.delivered.any()


def test_the_delivered_length_is_that_of_the_edit(pair, onsets):
    unit = isotropic(1, pair.target.model.shape.d_model, generator(1))[0]
    found = read(pair.target.model, 2, [Request(onsets, [Inject(unit, 0.5), Inject(unit, 2.0)])], MASS)[0]
    np.testing.assert_allclose(found.delivered, np.broadcast_to([0.5, 2.0], found.delivered.shape), rtol=1e-4)


def test_rows_are_the_chosen_onsets_and_say_where_they_stand(texts, chosen, onsets):
    wanted = {(t.prompt, int(at)) for t, positions in zip(texts, chosen, strict=True) for at in positions}
    assert set(zip(onsets.prompt.tolist(), onsets.position.tolist(), strict=True)) == wanted
    assert len(onsets) == len(wanted)
    task = {text.prompt: text.task for text in texts}
    assert onsets.task.tolist() == [task[prompt] for prompt in onsets.prompt]
    follows = by_row(onsets, texts, chosen, lambda text, _, at: text.next_is_target[at])
    assert np.array_equal(onsets.is_target, follows)


def test_texts_without_a_chosen_onset_are_left_out(texts, chosen):
    onsets = OnsetRows.of(texts, [chosen[0], chosen[1][:0], chosen[2]])
    assert texts[1].prompt not in onsets.prompt
    assert len(onsets) == len(chosen[0]) + len(chosen[2])


def test_readings_do_not_depend_on_how_texts_are_batched(pair, texts, chosen, onsets, edits, monkeypatch):
    together = read(pair.target.model, 2, [Request(onsets, [edits["inject"]])], MASS)[0]
    monkeypatch.setattr(rows, "TOKENS_PER_BATCH", 1)
    apart = OnsetRows.of(texts, chosen)
    assert len(apart.batches) == len(texts)
    alone = read(pair.target.model, 2, [Request(apart, [edits["inject"]])], MASS)[0]
    assert np.array_equal(apart.position, onsets.position)
    np.testing.assert_allclose(alone.value, together.value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["inject", "zero_ablate"])
def test_a_fan_reads_what_its_directions_read_one_by_one(pair, onsets, edits, kind):
    edit, units = edits[kind], isotropic(5, 128, generator(2))
    fan = Fan(edit, units, torch.tensor([1.0, 1.0, 2.0, 0.5, 1.0]))
    apart = [Control(lambda r, k=k: r + k * (edit(r) - r), u) for u, k in zip(units, fan.scales, strict=True)]
    requests = [Request(onsets, [unedited, *apart]), FanRequest(onsets, fan)]
    one_by_one, fanned = read(pair.target.model, 2, requests, MASS)
    np.testing.assert_allclose(fanned, one_by_one.value[:, 1:], atol=1e-6, rtol=1e-4)
    still = one_by_one.delivered[:, 1] == 0
    np.testing.assert_allclose(fanned[still], one_by_one.value[still, :1].repeat(5, 1), atol=1e-6, rtol=1e-4)


def test_side_effects_are_those_of_the_predictions(pair, texts, onsets, edits):
    model, edit = pair.target.model, edits["inject"]
    found = read(model, 2, [Request(onsets, [unedited, edit], joint=True)], MASS)[0]
    assert np.abs(found.kl[:, 0]).max() < 1e-9
    assert found.kl[:, 1].min() > 0
    following = np.array(
        [
            next(t for t in texts if t.prompt == prompt).token[at + 1]
            for prompt, at in zip(onsets.prompt, onsets.position, strict=True)
        ]
    )
    assert np.array_equal(np.isnan(found.off_target[:, 0]), np.isin(following, TARGET))


def test_joint_edits_can_stand_everywhere_or_from_the_first_onset_on(pair, texts, edits):
    onsets = OnsetRows.of(texts, [np.flatnonzero(text.is_onset)[2:4] for text in texts])
    for batch in onsets.batches:
        everywhere, onward, elsewhere = (batch.marked(places) for places in ("all", "onward", "elsewhere"))
        assert torch.equal(everywhere.sum(1), batch.lengths)
        assert torch.equal(onward.sum(1), batch.lengths - batch.positions.min(1).values)
        assert torch.equal(elsewhere.sum(1), batch.marked("onsets").sum(1))
        assert not (elsewhere & batch.marked("onsets")).any()
    few, many = (
        read(pair.target.model, 2, [Request(onsets, [unedited, edits["inject"]], joint=True, places=places)], MASS)[0]
        for places in ("onsets", "all")
    )
    assert not np.allclose(few.value[:, 1], many.value[:, 1])


def test_a_full_patch_closes_the_gap_and_a_random_one_of_its_length_does_not(toy_pair, toy_cache):
    """The positive control: the reference's stream at the onsets replaced by the target's."""
    texts = toy_cache.own_texts("confirm", "adhd")[:6]
    onsets = OnsetRows.of(texts, [np.flatnonzero(text.is_onset) for text in texts])
    columns = toy_cache.target_tokens(toy_pair).ids
    reference, target = (model.model for model in toy_pair.models)
    clean = [
        read(model, 2, [Request(onsets, [unedited])], TargetMass(columns))[0].value[:, 0]
        for model in (reference, target)
    ]
    gap = (clean[1] - clean[0]).mean()
    patch = Patch(Donor(target, 2), lambda rows: rows)

    def same_length(resid):
        lengths = torch.full((*resid.shape[:-1], 1), 2.0)
        away = isotropic(lengths.numel(), SHAPE.d_model, generator(3)).view(*resid.shape)
        away[..., CAUSE] = 0
        return resid + lengths * away

    request = Request(onsets, [patch, same_length], joint=True)
    found = read(reference, 2, [request], TargetMass(columns))[0].value.mean(axis=0)
    assert gap > 0.05
    assert found[0] - clean[0].mean() > 0.9 * gap
    assert abs(found[1] - clean[0].mean()) < 0.3 * gap


def test_the_direction_the_unembedding_reads_beats_every_random_one(toy_pair, toy_cache, toy_dictionary):
    texts = toy_cache.own_texts("confirm", "adhd")[:6]
    onsets = OnsetRows.of(texts, [np.flatnonzero(text.is_onset)[:2] for text in texts])
    columns = toy_cache.target_tokens(toy_pair).ids
    model, unit = toy_pair.reference.model, toy_dictionary.sae.direction(FEATURE)
    others = isotropic(40, SHAPE.d_model, generator(4))
    found = read(
        model,
        2,
        [Request(onsets, [unedited, Inject(unit, 1.0), *(Inject(o, 1.0) for o in others)])],
        TargetMass(columns),
    )[0]
    effect = (found.value[:, 1:] - found.value[:, :1]).mean(axis=0)
    assert effect[0] > np.abs(effect[1:]).max()


def test_at_the_end_of_a_text_nothing_follows_whatever_longer_texts_stand_beside_it(pair, texts, edits):
    last = [np.array([2, len(text) - 1]) for text in texts]
    onsets = OnsetRows.of(texts, last)
    assert len(onsets.batches) == 1
    assert len({len(text) for text in texts}) > 1
    for joint in (False, True):
        found = read(pair.target.model, 2, [Request(onsets, [unedited, edits["inject"]], joint=joint)], MASS)[0]
        length = {text.prompt: len(text) for text in texts}
        at_end = np.array([at == length[p] - 1 for p, at in zip(onsets.prompt, onsets.position, strict=True)])
        assert at_end.sum() == len(texts)
        assert np.isnan(found.off_target[at_end]).all()
        assert np.isfinite(found.off_target[~at_end]).any()
        for text in texts:  # the reading itself is that of the text alone
            alone = OnsetRows.of([text], [np.array([2, len(text) - 1])])
            one = read(pair.target.model, 2, [Request(alone, [unedited, edits["inject"]], joint=joint)], MASS)[0]
            mine = onsets.prompt == text.prompt
            np.testing.assert_allclose(found.value[mine], one.value, atol=1e-6, rtol=1e-4)
            np.testing.assert_allclose(found.off_target[mine], one.off_target, atol=1e-4)
