"""What must hold of a forward pass, however it is cut."""

import pytest
import torch

from sae_steer.errors import InputError


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_stopped_and_restarted_equals_the_whole_pass_bit_for_bit(model, tokens, layer):
    resid = model.run(model.embed(tokens), stop=layer + 1)
    assert torch.equal(model.unembed(model.run(resid, start=layer + 1)), model(tokens))


def test_residuals_are_those_of_the_whole_pass_and_the_last_one_is_the_output(model, tokens):
    asked_together = model.resid_posts(tokens, (3, 0, 2))
    assert sorted(asked_together) == [0, 2, 3]
    for layer, resid in asked_together.items():
        assert torch.equal(resid, model.run(model.embed(tokens), stop=layer + 1))
    assert torch.equal(model.unembed(asked_together[3]), model(tokens))


def test_right_padding_changes_no_real_position(model, tokens):
    padded = torch.cat([tokens, torch.full((3, 17), 5)], dim=1)
    torch.testing.assert_close(model(padded)[:, :40], model(tokens), atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(model, tokens):
    torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]), atol=1e-5, rtol=1e-5)


def test_no_position_sees_what_follows_it(model, tokens):
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 64
    assert torch.equal(model(tokens)[:, :20], model(changed)[:, :20])
    assert not torch.equal(model(tokens)[:, 20], model(changed)[:, 20])


def test_a_pass_at_given_positions_is_the_pass_at_those_positions(model, tokens):
    places = torch.arange(40).expand(3, -1)
    shifted = model.run(model.embed(tokens), positions=places + 7)  # rotary positions are relative
    torch.testing.assert_close(shifted, model.run(model.embed(tokens)), atol=1e-4, rtol=1e-4)
    stretched = model.run(model.embed(tokens), positions=places * 2)
    assert (stretched - shifted).abs().max() > 1e-2


@pytest.mark.parametrize("layer", [4, -1])
def test_a_layer_that_is_not_there_is_named(model, tokens, layer):
    with pytest.raises(InputError, match=f"no layer {layer}; it has layers 0 to 3"):
        model.resid_posts(tokens, (layer,))
