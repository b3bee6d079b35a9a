import re

import numpy as np
import pytest
from scipy.stats import ortho_group

from sae_steer.align import AffineMap, basis_check, choose_ridge, fit_affine, fit_procrustes, identity_r2
from sae_steer.errors import InputError

WIDTH = 16


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def x(random):
    scale = np.geomspace(0.1, 10, WIDTH)  # residual streams are far from isotropic
    return random.normal(size=(2000, WIDTH)) * scale + random.normal(size=WIDTH)


def check(x, y):
    return basis_check(x[:1500], y[:1500], x[1500:], y[1500:])


def test_a_stream_compared_with_itself_is_the_identity(x):
    found = check(x, x)
    assert identity_r2(x, x) == 1
    assert found.procrustes_r2 == pytest.approx(1, abs=1e-9)
    assert found.affine_r2 == pytest.approx(1, abs=1e-9)
    assert found.gain == pytest.approx(0, abs=1e-9)
    assert (found.n_fit, found.n_test) == (1500, 500)


def test_a_rotated_copy_shares_no_basis_but_a_rotation_finds_it(x):
    found = check(x, x @ ortho_group.rvs(WIDTH, random_state=1) + 3.0)
    assert found.identity_r2 < 0.2
    assert found.procrustes_r2 == pytest.approx(1, abs=1e-9)
    assert found.affine_r2 == pytest.approx(1, abs=1e-9)


def test_procrustes_returns_the_rotation_itself(x):
    rotation = ortho_group.rvs(WIDTH, random_state=1)
    found = fit_procrustes(x, x @ rotation + 3.0)
    np.testing.assert_allclose(found.weight, rotation, atol=1e-9)
    np.testing.assert_allclose(found.weight @ found.weight.T, np.eye(WIDTH), atol=1e-9)


def test_an_affine_map_is_recovered_and_a_rotation_is_not_enough(x, random):
    weight, bias = random.normal(size=(WIDTH, WIDTH)), random.normal(size=WIDTH)
    y = x @ weight + bias
    found = fit_affine(x, y, ridge=1e-10)
    np.testing.assert_allclose(found.weight, weight, atol=1e-4)
    np.testing.assert_allclose(found.bias, bias, atol=1e-4)
    assert check(x, y).affine_r2 == pytest.approx(1, abs=1e-6)
    assert check(x, y).procrustes_r2 < 0.9


def test_streams_without_relation_are_predicted_by_nothing(x, random):
    found = check(x, random.normal(size=x.shape))
    assert found.identity_r2 < 0
    assert found.affine_r2 < 0.02


def test_ridge_shrinks_to_the_mean_of_y(x, random):
    y = x @ random.normal(size=(WIDTH, WIDTH))
    heavy = fit_affine(x, y, ridge=1e12)
    np.testing.assert_allclose(heavy(x), np.broadcast_to(y.mean(axis=0), y.shape), atol=1e-6)
    assert heavy.r2(x, y) == pytest.approx(0, abs=1e-6)


def test_the_fit_does_not_depend_on_the_unit_of_x(x, random):
    y = x @ random.normal(size=(WIDTH, 3)) + random.normal(size=(len(x), 3))
    plain, scaled = fit_affine(x, y, ridge=0.1), fit_affine(1000 * x, y, ridge=0.1)
    np.testing.assert_allclose(scaled(1000 * x), plain(x), atol=1e-9)


def test_more_noise_and_fewer_rows_choose_a_heavier_ridge(random):
    x, noise = random.normal(size=(60, 40)), random.normal(size=(60, 40))
    clean, noisy = x @ random.normal(size=(40, 40)), 0.02 * x + noise
    assert choose_ridge(x, clean) < choose_ridge(x, noisy)


def test_half_precision_is_read_in_double(x):
    half = x.astype(np.float16)
    found = fit_affine(half, half, ridge=1e-6)
    assert found.weight.dtype == found(half).dtype == np.float64
    assert found.r2(half, half) == pytest.approx(1, abs=1e-6)


def test_streams_of_two_widths_have_an_affine_map_and_no_identity(x, random):
    y = x @ random.normal(size=(WIDTH, 5)) + 1
    for refused in identity_r2, fit_procrustes:
        with pytest.raises(InputError, match=re.escape("not 16 and 5")):
            refused(x, y)
    found = check(x, y)
    assert found.identity_r2 is found.procrustes_r2 is None
    assert found.affine_r2 == pytest.approx(1, abs=1e-6)
    assert found.gain == np.inf


def test_a_map_carries_a_direction_by_its_linear_part(random):
    found = AffineMap(random.normal(size=(4, 3)), random.normal(size=3))
    x, direction = random.normal(size=(1, 4)), random.normal(size=4)
    np.testing.assert_allclose(found(x + direction) - found(x), (direction @ found.weight)[None])


def test_an_infinity_is_refused(x):
    broken = x.copy()
    broken[3, 2] = np.inf
    with pytest.raises(AssertionError, match="x holds"):
        fit_affine(broken, x, ridge=1e-6)
