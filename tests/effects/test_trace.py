"""The parts of what an edit changes add up, block by block, to what it changes in the end."""

import numpy as np
import pytest
import torch
from toy import CAUSE, FEATURE, INTERVENE, SHAPE, toy_sae

import sae_steer as ss
from sae_steer.edits.edit import Inject, ZeroAblate
from sae_steer.effects.measure import OnsetRows
from sae_steer.effects.trace import differences, direct_effect, trace
from sae_steer.model.lens import adapt
from sae_steer.model.readout import TargetMass
from sae_steer.model.replay import CleanPass

POSITIONS = torch.tensor([[3, 9], [0, 14]])
UNIT = torch.eye(SHAPE.d_model)[CAUSE]


@pytest.fixture(scope="module", params=["native", "TransformerLens"])
def model(request, toy_pair):
    decoder = toy_pair.target.model
    return decoder if request.param == "native" else adapt(ss.to_hooked_transformer(decoder))


@pytest.fixture(scope="module")
def changes(model):
    tokens = torch.randint(0, 900, (2, 16), generator=torch.Generator().manual_seed(1))
    clean = CleanPass.of(model, tokens, 1)
    before = clean.at(POSITIONS)
    return clean, before, differences(clean, POSITIONS, before, before + 2.0 * UNIT)


def test_the_difference_after_a_block_is_that_before_it_and_what_attention_and_mlp_add(changes):
    _, _, found = changes
    for block in 2, 3:
        parts = found[block - 1, "resid"] + found[block, "attention"] + found[block, "mlp"]
        torch.testing.assert_close(found[block, "resid"], parts, atol=1e-4, rtol=1e-4)
        assert found[block, "mlp"].norm() > 1e-3


def test_the_last_difference_is_that_of_replay(changes):
    clean, before, found = changes
    carried = clean.above.single(POSITIONS, torch.stack([before, before + 2.0 * UNIT]))
    difference = (carried[1] - carried[0]).reshape(-1, SHAPE.d_model)
    torch.testing.assert_close(found[3, "resid"], difference, atol=1e-4, rtol=1e-4)


def test_an_edit_of_strength_zero_changes_nothing_anywhere(changes):
    clean, before, _ = changes
    found = differences(clean, POSITIONS, before, Inject(UNIT, 0.0)(before))
    assert not any(change.any() for change in found.values())


def test_the_frozen_readout_is_linear_in_the_change_and_the_clean_one_at_none(model):
    resid, change = torch.randn(2, 5, SHAPE.d_model, generator=torch.Generator().manual_seed(3))
    clean = model.unembed(resid)
    torch.testing.assert_close(model.unembed_frozen(resid, 0 * change), clean, atol=1e-5, rtol=1e-5)
    once, twice = (model.unembed_frozen(resid, times * change) - clean for times in (1, 2))
    torch.testing.assert_close(twice, 2 * once, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.unembed(resid + change) - clean, once, atol=1e-2)  # the real norm rescales


def across(resid):
    """A small step along `UNIT`, less its part along each row: the norm keeps its scale to first order."""
    along = (resid @ UNIT)[..., None] * resid / resid.square().sum(-1, keepdim=True)
    return resid + 1e-2 * (UNIT - along)


def test_above_the_last_block_the_direct_effect_is_the_whole_and_below_it_is_not(toy_pair, toy_cache):
    texts = toy_cache.own_texts("confirm", "adhd")[:4]
    onsets = OnsetRows.of(texts, [np.flatnonzero(text.is_onset)[:3] for text in texts])
    given = onsets, TargetMass((366, 417)), INTERVENE.resampling
    last, below = (direct_effect(toy_pair.target.model, layer, across, *given) for layer in (3, 2))
    assert last.mean == pytest.approx(last.whole.mean, rel=0.02)
    assert below.mean != pytest.approx(below.whole.mean, rel=0.005)  # block 3 reads the edit
    assert (last.n, last.tasks) == (len(onsets), onsets.tasks)


def test_the_trace_follows_only_rows_that_move_and_leaves_no_hook(toy_pair, toy_cache):
    model = toy_pair.target.model
    texts = toy_cache.own_texts("confirm", "adhd")[:4]
    onsets = OnsetRows.of(texts, [np.flatnonzero(text.is_onset)[:3] for text in texts])
    rows = trace(model, 2, Inject(UNIT, -1.5), onsets, UNIT)
    assert [row.block for row in rows] == [2, 3]
    assert rows[0].n == len(onsets)
    assert rows[0].resid_norm == pytest.approx(1.5, rel=1e-4)
    assert rows[0].resid_projection == pytest.approx(-1.5, rel=1e-4)
    assert rows[0].mlp_norm is None
    total = rows[0].resid_projection + rows[1].attention_projection + rows[1].mlp_projection
    assert rows[1].resid_projection == pytest.approx(total, rel=1e-3)
    silent = toy_sae()
    silent.b_enc[FEATURE] = -1e6
    nothing = trace(model, 2, ZeroAblate(silent, FEATURE), onsets, UNIT)
    assert (nothing[0].n, nothing[1].resid_norm) == (0, None)
    assert not any(module._forward_hooks for module in model.modules())
