"""The losses are the paper's formulas."""

import torch

from sae_steer.runtime import generator
from sae_steer.sae.losses import auxk_loss, reconstruction_mse

X, X_HAT = (torch.randn(30, 8, generator=generator(seed)) for seed in (1, 2))


def test_mse_sums_over_dimensions_and_averages_over_rows() -> None:
    by_hand = sum(float((x - y) @ (x - y)) for x, y in zip(X, X_HAT, strict=True)) / 30
    torch.testing.assert_close(float(reconstruction_mse(X, X_HAT)), by_hand)


def test_auxk_is_one_for_the_errors_mean_and_zero_for_the_error() -> None:
    error = X - X_HAT
    torch.testing.assert_close(auxk_loss(error, error.mean(0).expand_as(error)), torch.tensor(1.0))
    assert float(auxk_loss(error, error)) == 0


def test_auxk_does_not_depend_on_the_errors_scale() -> None:
    torch.testing.assert_close(auxk_loss(X, X_HAT), auxk_loss(1000 * X, 1000 * X_HAT))


def test_auxk_sends_no_gradient_to_the_error() -> None:
    error, error_hat = X.clone().requires_grad_(), X_HAT.clone().requires_grad_()
    auxk_loss(error, error_hat).backward()
    assert error.grad is None
    assert error_hat.grad is not None


def test_auxk_of_a_constant_error_is_finite() -> None:
    assert bool(auxk_loss(torch.zeros(4, 3), torch.zeros(4, 3)).isfinite())
