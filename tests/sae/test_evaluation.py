"""The fraction of variance explained has one definition."""

from itertools import pairwise

import pytest
import torch

from sae_steer.errors import InputError
from sae_steer.randomness import generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.sae.evaluation import SAEMetrics, evaluate
from sae_steer.world import World

X = torch.randn(300, 16, generator=generator(4)) + 100 * torch.randn(16, generator=generator(5))


def test_fve_is_one_minus_error_over_deviation_from_the_mean(random_sae: TopKSAE, world: World) -> None:
    metrics = evaluate(random_sae, [X], world)
    error = (X.double() - random_sae(X).detach()).square().sum()
    deviation = (X.double() - X.double().mean(0)).square().sum()
    assert metrics.fve == pytest.approx(float(1 - error / deviation), rel=1e-9)
    assert metrics.rows == 300


def test_figures_do_not_depend_on_how_rows_were_cut(random_sae: TopKSAE, world: World) -> None:
    whole, cut = (evaluate(random_sae, X.split(size), world) for size in (300, 17))
    assert cut.fve == pytest.approx(whole.fve, rel=1e-6)
    assert torch.equal(cut.firings, whole.firings)


def test_l0_and_dead_share_count_firings(random_sae: TopKSAE, world: World) -> None:
    metrics = evaluate(random_sae, [X], world)
    fires = random_sae.encode(X).dense() > 0
    assert metrics.l0 == pytest.approx(float(fires.double().sum(1).mean()))
    assert metrics.dead_share == pytest.approx(float((~fires.any(0)).double().mean()))
    assert torch.equal(metrics.rates, fires.double().mean(0))


def test_every_living_feature_is_in_the_bin_of_its_rate(random_sae: TopKSAE, world: World) -> None:
    random_sae.b_enc.data[::7] = -1e6  # some that never fire
    metrics = evaluate(random_sae, [X], world)
    density, rates = metrics.density, metrics.rates
    assert density.log10_edges == [step / 4 for step in range(-12, 1)], "300 rows: three decades, a quarter each"
    for (low, high), count in zip(pairwise(density.log10_edges), density.counts, strict=True):
        assert count == ((rates >= 10**low) & ((rates < 10**high) | (rates == 1) & (high == 0))).sum()
    assert density.dead == (rates == 0).sum() >= 10
    assert sum(density.counts) + density.dead == 64


@pytest.mark.parametrize("rows", [1, 2, 9, 10, 100, 101, 1000])
def test_the_least_rate_and_the_largest_are_in_the_histogram(rows: int) -> None:
    firings = torch.tensor([0, 1, rows])
    density = SAEMetrics(rows=rows, squared_error=0.0, squared_deviation=1.0, firings=firings).density
    assert (sum(density.counts), density.dead) == (2, 1)
    assert density.counts[-1] >= 1


def test_the_mean_alone_explains_nothing(world: World) -> None:
    sae = TopKSAE(TopKConfig(d_in=16, d_sae=8, k=2))
    sae.b_dec.data.copy_(X.double().mean(0))
    metrics = evaluate(sae, X.split(50), world)
    assert metrics.fve == pytest.approx(0, abs=1e-6)
    assert metrics.dead_share == 1
    assert metrics.l0 == 0


def test_no_rows_is_an_error(random_sae: TopKSAE, world: World) -> None:
    with pytest.raises(InputError, match="no rows to evaluate"):
        evaluate(random_sae, [X[:0]], world)
