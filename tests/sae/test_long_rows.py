"""Rows a hundred times as long as the others ruin no training and decide no figure (the case sink_row_flatters.py)."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sae_steer.randomness import generator
from sae_steer.sae.evaluation import evaluate, evaluate_groups
from sae_steer.sae.saelens.training import train_saelens
from sae_steer.sae.training import shorten_, train_dictionary, typical_moments
from sae_steer.settings import SAESettings

D_IN, EVERY, LENGTH = 32, 14, 400.0
PARTS = normalize(torch.randn(64, D_IN, generator=generator(0)), dim=1)


def rows(count: int, seed: int) -> torch.Tensor:
    """Sparse sums of 64 directions; one row in 14 is a first token's, 400 long."""
    drawn = generator(seed)
    x = (torch.rand(count, 64, generator=drawn) * (torch.rand(count, 64, generator=drawn) < 0.06)) @ PARTS
    x[::EVERY] = LENGTH * torch.eye(D_IN)[0]
    return x


class Rows:
    """A row source of the plainest kind: its moments are those of all its rows."""

    d_in, n_rows, fingerprint = D_IN, 60_000, "x"

    def __init__(self, *, keep: bool):
        x = rows(60_000, 1)
        self.x = x if keep else x[torch.arange(len(x)) % EVERY != 0]
        self.mean = self.x.mean(0)
        self.mean_square = float((self.x - self.mean).square().sum(1).mean())

    def batch(self, step: int, size: int, seed: int) -> torch.Tensor:
        return self.x[torch.randint(len(self.x), (size,), generator=generator(step))]


HELD = rows(8_000, 2)
ORDINARY = np.arange(len(HELD)) % EVERY != 0


def ordinary_fve(sae, world) -> float:
    return evaluate(sae, [HELD[torch.from_numpy(ORDINARY)]], world).fve


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_training_on_long_rows_explains_the_others_as_well_as_training_without_them(architecture, world):
    settings = SAESettings(architecture=architecture, d_sae=128, k=6, rows=150_000, batch_size=512, precision="float32")
    kept, without = (train_dictionary(Rows(keep=keep), settings, world=world).sae for keep in (True, False))
    assert ordinary_fve(without, world) > 0.85
    assert ordinary_fve(kept, world) > ordinary_fve(without, world) - 0.02
    if architecture == "topk":  # at a hundred times the length all features pass a threshold, whatever was learned
        assert evaluate(kept, [HELD], world).fve > 0.8, "the long rows are read too, at the length they have"


def test_saelens_own_trainer_scales_by_the_typical_rows_too(world):
    settings = SAESettings(d_sae=128, k=6, rows=150_000, batch_size=512, precision="float32", lr=5e-3)
    kept, without = (train_saelens(Rows(keep=keep), settings, "topk", world=world) for keep in (True, False))
    assert ordinary_fve(kept, world) > ordinary_fve(without, world) - 0.03


def test_the_moments_are_the_sources_own_unless_long_rows_make_them():
    source = Rows(keep=False)
    mean, square = typical_moments(source, source.batch(0, 512, 0))
    assert mean is source.mean
    assert square == source.mean_square
    ruined = Rows(keep=True)
    mean, square = typical_moments(ruined, ruined.batch(0, 512, 0))
    assert square == pytest.approx(source.mean_square, rel=0.1)
    assert float(mean.norm()) < 2.0 < float(ruined.mean.norm())


def test_only_rows_beyond_ten_usual_lengths_are_shortened_and_in_their_direction():
    x = torch.randn(50, D_IN, generator=generator(3))
    x[7] *= 400
    x[9] *= 1e9
    before, usual = x.clone(), math.sqrt(D_IN)
    after = shorten_(x, usual)
    others = torch.arange(50) != 7
    assert torch.equal(after[others], before[others]), "damage stays, for the loss to tell"
    torch.testing.assert_close(after[7], usual * before[7] / before[7].norm())


def test_figures_of_groups_are_those_of_their_rows_alone(random_sae, world):
    x = torch.randn(900, 16, generator=generator(4))
    some = np.random.default_rng(0).random(900) < 0.3
    found = evaluate_groups(random_sae, x.split(100), {"some": some, "all": None, "late": np.arange(900) > 850}, world)
    for name, mine in (("some", some), ("all", slice(None)), ("late", np.arange(900) > 850)):
        alone = evaluate(random_sae, [x[mine] if isinstance(mine, slice) else x[torch.from_numpy(mine)]], world)
        assert found[name].rows == alone.rows
        assert found[name].fve == pytest.approx(alone.fve, rel=1e-9)
        assert torch.equal(found[name].firings, alone.firings)
