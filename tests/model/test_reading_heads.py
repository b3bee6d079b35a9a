"""Heads are read and silenced alike in our decoder and in TransformerLens."""

import pytest
import torch
from decoder_shapes import SHAPES

from sae_steer.errors import InputError, NotDeliveredError
from sae_steer.model.decoder import init_decoder
from sae_steer.model.heads import head_replaced, read_heads
from sae_steer.model.lens import adapt, to_hooked_transformer
from sae_steer.randomness import generator

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=SHAPES)
def both(request):
    model = init_decoder(SHAPES[request.param], generator(3)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(5.0)
    return model, adapt(to_hooked_transformer(model))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(64, (3, 17), generator=generator(5))


def seen(model, ids) -> list:
    kept: list = []
    read_heads(model, ids, lambda layer, pattern, read: kept.append((layer, pattern.clone(), read.clone())))
    return kept


def test_patterns_and_what_heads_read_are_those_of_transformer_lens(both, ids) -> None:
    ours, lens = both
    _, cache = lens.hooked.run_with_cache(ids)
    for found in (seen(ours, ids), seen(lens, ids)):
        assert [layer for layer, _, _ in found] == list(range(ours.shape.n_layers))
        for layer, pattern, read in found:
            torch.testing.assert_close(pattern, cache[f"blocks.{layer}.attn.hook_pattern"], **CLOSE)
            torch.testing.assert_close(read.transpose(1, 2), cache[f"blocks.{layer}.attn.hook_z"], **CLOSE)


@torch.no_grad()
def test_a_head_at_zero_is_a_head_without_its_columns(both, ids) -> None:
    ours, lens = both
    zeros = torch.zeros(ours.shape.d_head)
    weight = ours.layers[1].self_attn.o_proj.weight
    columns = slice(2 * ours.shape.d_head, 3 * ours.shape.d_head)
    whole, kept = ours(ids), weight[:, columns].clone()
    weight[:, columns] = 0
    expected = ours(ids)
    weight[:, columns] = kept
    for model in (ours, lens):
        with head_replaced(model, 1, 2, zeros):
            torch.testing.assert_close(model(ids), expected, **CLOSE)
    assert not torch.allclose(expected, whole, atol=1e-3)
    assert torch.equal(ours(ids), whole), "gone after the with"


@torch.no_grad()
def test_a_head_at_a_value_reads_it_everywhere(both, ids) -> None:
    ours, lens = both
    value = torch.randn(ours.shape.d_head, generator=generator(6))
    with head_replaced(ours, 0, 3, value), head_replaced(lens, 0, 3, value):
        torch.testing.assert_close(ours(ids), lens(ids), **CLOSE)
        _, cache = lens.hooked.run_with_cache(ids)
    assert torch.equal(cache["blocks.0.attn.hook_z"][:, :, 3], value.expand(*ids.shape, -1))


def test_a_head_that_is_never_asked_or_not_there_is_an_error(both) -> None:
    ours, _ = both
    with pytest.raises(NotDeliveredError, match="L1H2 was never asked"), head_replaced(ours, 1, 2, torch.zeros(16)):
        pass
    with (
        pytest.raises(InputError, match="layer 1 has no head 8; it has heads 0 to 7"),
        head_replaced(ours, 1, 8, torch.zeros(16)),
    ):
        pass
