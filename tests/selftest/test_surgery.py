"""Edits of weights that must leave the function as it was, and what is planted in the room they make."""

import pytest
import torch
from tiny_pair import SHAPE, lively

from sae_steer.randomness import generator
from sae_steer.selftest.surgery import plant_neuron, random_rotation, rotated, widened

TOKENS = torch.randint(0, SHAPE.d_vocab, (3, 40), generator=generator(1))
LANES = 3


@pytest.fixture
def wide():
    return widened(lively(SHAPE, 1), lanes=LANES, heads=1, neurons=2)


def test_a_widened_decoder_computes_what_it_computed(wide):
    torch.testing.assert_close(wide(TOKENS), lively(SHAPE, 1)(TOKENS), rtol=1e-4, atol=1e-4)


def test_spare_lanes_stay_empty(wide):
    streams = wide.resid_posts(TOKENS, tuple(range(SHAPE.n_layers)))
    assert all((resid[..., SHAPE.d_model :] == 0).all() for resid in streams.values())


def test_another_basis_changes_no_logit_and_turns_every_stream(wide):
    turn = random_rotation(wide.shape.d_model, generator(2))
    turned = rotated(wide, turn)
    torch.testing.assert_close(turned(TOKENS), wide(TOKENS), rtol=1e-3, atol=1e-3)
    before, after = (model.resid_posts(TOKENS, (1,))[1].double() for model in (wide, turned))
    torch.testing.assert_close(after, before @ turn, rtol=1e-3, atol=1e-3)


def test_a_planted_neuron_adds_the_product_of_its_hinge_and_what_it_reads(wide):
    lane, last = SHAPE.d_model, wide.layers[-1]
    wide.embed_tokens.weight[:, lane] = 1.0
    before = wide.resid_posts(TOKENS, (SHAPE.n_layers - 1,))[SHAPE.n_layers - 1]
    plant_neuron(last, SHAPE.d_mlp, gate={lane: 100.0}, up={lane: 1.0}, down={lane + 1: 2.0})
    after = wide.resid_posts(TOKENS, (SHAPE.n_layers - 1,))[SHAPE.n_layers - 1]
    moved = (after - before)[..., lane + 1]
    assert (moved > 0).all()
    others = torch.arange(wide.shape.d_model) != lane + 1
    assert torch.equal(after[..., others], before[..., others])
