"""The algebra of interventions."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import normalize

from sae_steer.edits.controls import isotropic
from sae_steer.edits.edit import Control, Donor, Inject, Subtract, ZeroAblate
from sae_steer.model.decoder import init_decoder
from sae_steer.randomness import generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.settings import DecoderSettings

D_MODEL, FEATURE = 16, 3


@pytest.fixture
def sae() -> TopKSAE:
    """Random weights: it explains little, so the error part is large."""
    sae = TopKSAE(TopKConfig(d_in=D_MODEL, d_sae=40, k=6)).requires_grad_(False)
    for number, weight in enumerate(sae.parameters()):
        weight.normal_(generator=generator(1, number))
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    return sae


@pytest.fixture
def orthonormal() -> TopKSAE:
    """A dictionary of which every feature can be removed cleanly: it reads what it writes."""
    sae = TopKSAE(TopKConfig(d_in=D_MODEL, d_sae=D_MODEL, k=8)).requires_grad_(False)
    basis, _ = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=generator(2)))
    sae.W_dec.copy_(basis)
    sae.W_enc.copy_(basis.T)
    return sae


@pytest.fixture
def resid() -> torch.Tensor:
    return torch.randn(5, 30, D_MODEL, generator=generator(3))


@pytest.fixture
def direction() -> torch.Tensor:
    return normalize(torch.randn(D_MODEL, generator=generator(4)), dim=0)


def test_strength_zero_changes_nothing(resid, direction, sae):
    for edit in (Inject(direction, 0.0), Subtract(direction, 0.0), ZeroAblate(sae, FEATURE, 0.0)):
        assert torch.equal(edit(resid), resid)


def test_inject_then_subtract_returns_the_input(resid, direction):
    there = Inject(direction, 2.5)(resid)
    torch.testing.assert_close(Subtract(direction, 2.5)(there), resid)


def test_injections_add_up(resid, direction):
    once = Inject(direction, 1.5)
    torch.testing.assert_close(once(once(resid)), Inject(direction, 3.0)(resid))


def test_zero_ablate_twice_is_once_where_the_feature_is_removed(resid, orthonormal):
    ablate = ZeroAblate(orthonormal, FEATURE)
    once = ablate(resid)
    assert not torch.equal(once, resid)
    torch.testing.assert_close(ablate(once), once)


def test_ablating_a_silent_feature_changes_nothing(resid, sae):
    silent = sae.activation_of(resid.flatten(0, 1), FEATURE).view(resid.shape[:-1]) == 0
    assert silent.any()
    assert not silent.all()
    edited = ZeroAblate(sae, FEATURE)(resid)
    assert torch.equal(edited[silent], resid[silent])
    assert (edited[~silent] != resid[~silent]).any(dim=-1).all()


def test_zero_ablate_takes_the_contribution_and_leaves_the_error(resid, sae):
    rows = resid.flatten(0, 1)
    contribution = sae.activation_of(rows, FEATURE)[:, None] * sae.W_dec[FEATURE]
    error = rows - sae(rows)
    assert error.norm() > rows.norm() / 2
    assert contribution.any()
    change = ZeroAblate(sae, FEATURE)(rows) - rows
    torch.testing.assert_close(change, -contribution)
    torch.testing.assert_close(ZeroAblate(sae, FEATURE, 0.5)(rows) - rows, -contribution / 2)


def test_one_row_alone_is_edited_as_in_a_batch(resid, sae):
    edit = ZeroAblate(sae, FEATURE)
    torch.testing.assert_close(edit(resid[0, 0]), edit(resid)[0, 0])


def test_an_edit_leaves_its_input_alone(resid, direction, sae):
    before = resid.clone()
    for edit in (Inject(direction, 2.0), Subtract(direction, 2.0), ZeroAblate(sae, FEATURE)):
        Control(edit, direction)(resid)
    assert torch.equal(resid, before)


def test_a_control_moves_every_row_as_far_as_the_edit_along_its_own_direction(resid, direction, sae):
    for edit in (Inject(normalize(sae.W_dec[0], dim=0), 2.0), ZeroAblate(sae, FEATURE)):
        moved, wanted = Control(edit, direction)(resid) - resid, (edit(resid) - resid).norm(dim=-1)
        torch.testing.assert_close(moved.norm(dim=-1), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(moved, wanted[..., None] * direction, atol=1e-5, rtol=1e-5)


def test_isotropic_directions_have_length_one_no_favourite_and_follow_the_generator():
    drawn = isotropic(4_000, D_MODEL, generator(7))
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(4_000))
    assert drawn.mean(dim=0).abs().max() < 4 / (4_000 * D_MODEL) ** 0.5
    assert torch.equal(drawn, isotropic(4_000, D_MODEL, generator(7)))
    assert not torch.equal(drawn, isotropic(4_000, D_MODEL, generator(8)))


def test_a_donor_is_read_once_for_all_threads_that_patch_its_stream(monkeypatch):
    shape = DecoderSettings(n_layers=1, n_heads=2, n_kv_heads=2, d_model=16, d_head=8, d_mlp=8, d_vocab=16)
    model, tokens, calls = init_decoder(shape, generator(5)), torch.tensor([[1, 2, 3]]), []

    def slow(tokens, layers):
        calls.append(layers)
        time.sleep(0.05)  # the others come while this one, as TransformerLens's would, bears no second caller
        return {layers[0]: torch.ones(1, 3, 16)}

    monkeypatch.setattr(model, "resid_posts", slow)
    donor = Donor(model, 0)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: donor.stream(tokens), range(4)))
    assert calls == [(0,)]
    assert all(torch.equal(stream, found[0]) for stream in found)
