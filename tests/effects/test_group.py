"""Which features are like the one studied, and what ablating them together does."""

import numpy as np
import pytest
import torch
from toy import FEATURE, INTERVENE, toy_sae

from sae_steer.edits.edit import AblateGroup, ZeroAblate
from sae_steer.edits.variants import Direction
from sae_steer.effects.group import features_like, read_group
from sae_steer.effects.readings import Onsets
from sae_steer.model.readout import TargetMass
from sae_steer.randomness import generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE

TWIN, NEAR_BUT_SILENT, FAR, APART = 3, 4, 5, 6
ROWS = torch.randn(400, 16, generator=generator(2))


@pytest.fixture(scope="module")
def sae():
    """Feature 7 reads axis 1; 3 fires with it and writes nearly the same; 4 writes the same and never fires; 5 fires
    with it and writes another axis; 6 fires where it does not.
    """
    made = TopKSAE(TopKConfig(d_in=16, d_sae=24, k=6)).requires_grad_(False)
    made.W_enc.zero_()
    made.b_enc.fill_(-1e6)
    made.b_enc[[FEATURE, TWIN, FAR, APART]] = 0.0
    made.W_enc[1, [FEATURE, TWIN, FAR]], made.W_enc[1, APART] = torch.tensor([1.0, 0.9, 0.8]), -1.0
    made.W_dec.copy_(torch.nn.functional.normalize(torch.randn(24, 16, generator=generator(6)), dim=1))
    axes = torch.eye(16)
    made.W_dec[FEATURE] = made.W_dec[NEAR_BUT_SILENT] = axes[1]
    made.W_dec[APART] = axes[1]
    made.W_dec[TWIN] = 0.8 * axes[1] + 0.6 * axes[2]
    made.W_dec[FAR] = axes[3]
    return made


def direction_of(sae, feature=FEATURE):
    return Direction("a feature", sae.direction(feature), 1.0, "here", sae, feature)


def test_a_group_is_of_features_that_fire_where_it_fires_nearest_first(sae):
    like = features_like(direction_of(sae), ROWS, np.ones(len(ROWS), dtype=bool))
    assert [one.feature for one in like] == [TWIN, FAR]
    assert [one.cosine for one in like] == pytest.approx([0.8, 0.0], abs=1e-6)
    assert [one.cofiring for one in like] == [1.0, 1.0]


def test_cofiring_is_counted_at_onsets_alone(sae):
    positive = (ROWS[:, 1] > 0).numpy()
    rows = ROWS.clone()
    rows[positive, 1] = 0.0  # the studied feature is silent at onsets
    assert features_like(direction_of(sae), rows, positive) == ()


def test_ablating_a_group_is_ablating_its_features_in_turn_where_one_does_not_silence_another(sae):
    together = AblateGroup(sae, (FEATURE, FAR))(ROWS)
    apart = ROWS + (ZeroAblate(sae, FEATURE)(ROWS) - ROWS) + (ZeroAblate(sae, FAR)(ROWS) - ROWS)
    torch.testing.assert_close(together, apart)
    assert torch.equal(AblateGroup(sae, (FEATURE, FAR), 0.0)(ROWS), ROWS)
    silent = ROWS[:, 1] < 0
    assert torch.equal(together[silent], ROWS[silent])
    assert (together != ROWS)[~silent].any(1).all()


def test_the_group_of_one_does_what_the_feature_does(toy_pair, toy_cache):
    onsets = Onsets.of(toy_cache.own_texts("confirm", "adhd")[:12], INTERVENE)
    given = toy_pair.target.model, 2, direction_of(toy_sae())
    group, trials = read_group(*given, (), onsets, TargetMass((366, 417, 431)), INTERVENE)
    for effect in group.single, group.joint:
        assert effect.mean == pytest.approx(effect.alone.mean, abs=1e-7)
        assert effect.mean < 0
        assert effect.rows_edited > 0
    assert len(trials["p_edited"]) == len(onsets.single) + len(onsets.joint)
