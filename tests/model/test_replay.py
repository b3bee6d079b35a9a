"""Replaying what an edit can change equals running the whole model with the edit in it."""

import pytest
import torch
from decoder_shapes import SHAPES
from lens_models import gpt2_like
from tiny_pair import lively
from torch import Tensor

from sae_steer.edits.edit import Inject, Subtract
from sae_steer.errors import InputError, NotDeliveredError
from sae_steer.model.lens import adapt, to_hooked_transformer
from sae_steer.model.replay import CleanPass, edited, whole_pass
from sae_steer.randomness import generator

POSITIONS = torch.tensor([[0, 7, 39], [3, 3, 20], [38, 1, 12]])
LAYERS = [0, 1, 3]
LENS = ["TransformerLens, learned positions", "TransformerLens, rotary and grouped queries"]


@pytest.fixture(params=[*SHAPES, *LENS])
def model(request):
    """The native decoder in three shapes, and two models that TransformerLens runs."""
    if request.param == LENS[0]:
        return adapt(gpt2_like(d_vocab=64, n_layers=4, d_model=128, n_heads=4, d_head=32))
    if request.param == LENS[1]:
        return adapt(to_hooked_transformer(lively(SHAPES["grouped queries"], 1)))
    return lively(SHAPES[request.param], 1)


def site(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def push(seed: int = 4, strength: float = 3.0) -> Inject:
    return Inject(torch.randn(128, generator=generator(seed)), strength)


def only_at(rows: Tensor, positions: Tensor, edit):
    """`edit` at single places of a batch, as an edit of the whole stream."""

    def apply(resid: Tensor) -> Tensor:
        changed = resid.clone()
        changed[rows, positions] = edit(resid[rows, positions])
        return changed

    return apply


def marked(real: Tensor) -> Tensor:
    """[batch, pos] the places of `POSITIONS` that are real."""
    at = torch.zeros(3, 40, dtype=torch.bool)
    rows, slots = real.nonzero(as_tuple=True)
    at[rows, POSITIONS[rows, slots]] = True
    return at


def log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def assert_same_odds(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(log_probabilities(one), log_probabilities(other), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_unedited_replay_is_the_whole_pass(model, tokens, layer):
    clean = CleanPass.of(model, tokens, layer)
    whole = model(tokens)[torch.arange(3)[:, None], POSITIONS]
    torch.testing.assert_close(clean.read_single(POSITIONS, clean.at(POSITIONS)[None])[0], whole, atol=1e-5, rtol=1e-5)
    at = marked(torch.ones(3, 3, dtype=torch.bool))
    joint = clean.read_joint(at, clean.resid[at][None], POSITIONS)[0]
    torch.testing.assert_close(joint, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_one_edited_position_is_the_whole_pass_with_a_hook_there(model, tokens, layer):
    clean, edit = CleanPass.of(model, tokens, layer), push()
    replayed = clean.read_single(POSITIONS, edit(clean.at(POSITIONS))[None])[0]
    for slot in range(3):
        places = torch.arange(3), POSITIONS[:, slot]
        with edited(model, site(layer), only_at(*places, edit)):
            whole = model(tokens)[places]
        assert_same_odds(replayed[:, slot], whole)
        assert (log_probabilities(whole) - log_probabilities(model(tokens)[places])).abs().max() > 0.1


@pytest.mark.parametrize("layer", LAYERS)
def test_jointly_edited_positions_are_the_whole_pass_with_hooks_at_all_of_them(model, tokens, layer):
    clean, edits = CleanPass.of(model, tokens, layer), (push(), push(5, -2.0))
    real = torch.tensor([[True, True, True], [True, False, True], [True, True, False]])
    at = marked(real)
    replayed = clean.read_joint(at, torch.stack([edit(clean.resid[at]) for edit in edits]), POSITIONS)
    rows, slots = real.nonzero(as_tuple=True)
    for copy, edit in enumerate(edits):
        with edited(model, site(layer), only_at(rows, POSITIONS[rows, slots], edit)):
            whole = model(tokens)
        assert_same_odds(replayed[copy][real], whole[rows, POSITIONS[rows, slots]])


@pytest.mark.parametrize("name", ["standard", "adhd"])
def test_replay_of_the_packaged_models_is_the_whole_pass_with_a_hook(pair, name):
    decoder, tokens = pair.model(name).model, torch.randint(0, 1024, (2, 200), generator=generator(8))
    clean, edit, positions = CleanPass.of(decoder, tokens, 2), push(), torch.tensor([[150], [3]])
    places = torch.arange(2), positions[:, 0]
    with edited(decoder, site(2), only_at(*places, edit)):
        whole = decoder(tokens)[places]
    assert_same_odds(clean.read_single(positions, edit(clean.at(positions))[None])[0, :, 0], whole)


@pytest.mark.parametrize("edit", [push(strength=0.0), Subtract(torch.ones(128), 0.0)])
def test_an_edit_of_strength_zero_is_the_baseline_bit_for_bit(model, tokens, edit):
    with edited(model, site(1), edit):
        assert torch.equal(model(tokens), model(tokens))
        inside = model(tokens)
    assert torch.equal(inside, model(tokens))
    clean = CleanPass.of(model, tokens, 1)
    before = clean.at(POSITIONS)
    assert torch.equal(clean.read_single(POSITIONS, edit(before)[None]), clean.read_single(POSITIONS, before[None]))


def test_activations_upstream_of_an_edit_are_bit_equal(model, tokens):
    clean = model.resid_posts(tokens, (0, 1, 2, 3))
    with edited(model, site(1), only_at(torch.arange(3), torch.tensor([20, 20, 20]), push())):
        found = model.resid_posts(tokens, (0, 1, 2, 3))
    assert torch.equal(found[0], clean[0])
    for layer in (1, 2, 3):
        assert torch.equal(found[layer][:, :20], clean[layer][:, :20])
        assert not torch.equal(found[layer][:, 20], clean[layer][:, 20])
    assert torch.equal(found[1][:, 21:], clean[1][:, 21:])
    assert not torch.equal(found[3][:, 21:], clean[3][:, 21:])


def test_an_edit_after_tokens_moves_their_positions_alone(model, tokens):
    clean = model.resid_posts(tokens, (2,))[2]
    with edited(model, site(2), push(), after=(3, 9)):
        found = model.resid_posts(tokens, (2,))[2]
    moved = (found != clean).any(-1)
    assert torch.equal(moved, (tokens == 3) | (tokens == 9))
    torch.testing.assert_close(found[moved], push()(clean[moved]))


def test_edits_nest_in_the_order_they_were_made(model, tokens):
    with edited(model, site(1), lambda resid: resid * 2.0), edited(model, site(1), lambda resid: resid + 1.0):
        found = model.resid_posts(tokens, (1,))[1]
    assert torch.equal(found, model.resid_posts(tokens, (1,))[1] * 2.0 + 1.0)


def test_the_edit_is_gone_after_the_with_and_after_an_exception(model, tokens):
    before = model(tokens)
    with edited(model, site(0), push()):
        assert not torch.equal(model(tokens), before)
    assert torch.equal(model(tokens), before)
    with pytest.raises(ZeroDivisionError), edited(model, site(0), push()):
        raise ZeroDivisionError
    assert torch.equal(model(tokens), before)
    assert not model.embed_tokens._forward_pre_hooks
    assert not any(block._forward_hooks for block in model.layers)


def test_an_edit_that_met_no_position_is_an_error(model, tokens):
    with pytest.raises(NotDeliveredError, match="met no position"), edited(model, site(1), push()):
        pass
    with pytest.raises(NotDeliveredError, match="met no position"), edited(model, site(1), push(), after=(64,)):
        model(tokens)


def test_the_exception_inside_is_the_one_that_is_raised(model):
    with pytest.raises(ZeroDivisionError), edited(model, site(1), push()):
        raise ZeroDivisionError


@pytest.mark.parametrize("wrong", ["blocks.4.hook_resid_post", "blocks.1.hook_mlp_out", "layer 1"])
def test_a_site_that_is_not_there_is_named(model, wrong):
    with pytest.raises(InputError, match="no layer 4" if "4" in wrong else "cannot edit at"), edited(model, wrong, abs):
        pass


def test_edits_read_together_equal_edits_read_one_by_one(model, tokens):
    clean = CleanPass.of(model, tokens, 1)
    before = clean.at(POSITIONS)
    edits = torch.stack([before, before + 1.0, 2 * before])
    apart = torch.cat([clean.read_single(POSITIONS, edit[None]) for edit in edits])
    torch.testing.assert_close(clean.read_single(POSITIONS, edits), apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_many_edits_of_one_position_equal_those_edits_one_by_one(model, tokens, layer):
    clean = CleanPass.of(model, tokens, layer)
    before = clean.at(POSITIONS)
    copies = torch.stack([before + scale * torch.randn(128, generator=generator(3)) for scale in (0.0, 1.0, -4.0)])
    apart = clean.read_single(POSITIONS, copies)
    for row, slot in ((0, 0), (0, 2), (1, 1), (2, 0)):
        many = clean.read_many(row, int(POSITIONS[row, slot]), copies[:, row, slot])
        assert_same_odds(many, apart[:, row, slot])


def test_a_whole_pass_tells_the_stream_it_delivered_and_leaves_no_hook(model, tokens):
    at, edit = marked(torch.ones(3, 3, dtype=torch.bool)), push()
    for layer in LAYERS:
        clean = model.resid_posts(tokens, (layer,))[layer]
        received, logits = whole_pass(model, tokens, layer, edit, at)
        assert torch.equal(received[~at], clean[~at])
        torch.testing.assert_close(received[at], edit(clean[at]))
        with edited(model, site(layer), edit, at=at):
            assert torch.equal(model(tokens), logits)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in [*model.layers, model.norm])
