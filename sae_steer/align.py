"""How well one model's residual stream is a map of another's, on rows read at the same tokens.

Two trainings share no basis (2506.06609), so a direction of one model means something in the other only
through a map: y = x (the raw direction), y = x R + b with R orthogonal, or y = x W + b. Each is judged by
R2 on rows it was not fitted on. A direction is carried over by the linear part: `direction @ map.weight`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import Ridge

from sae_steer.errors import InputError

RIDGES = (1e-6, 1e-4, 1e-2, 1.0)
"""Penalties `basis_check` chooses among, in units of the mean variance of x."""
CHOOSING_SHARE = 0.2
"""Last part of the fit rows, on which the ridge is chosen; whole runs of rows, as neighbours share a text."""


@dataclass(frozen=True)
class AffineMap:
    """y = x @ weight + bias."""

    weight: Float[np.ndarray, "d_x d_y"]
    bias: Float[np.ndarray, " d_y"]

    def __call__(self, x: Float[np.ndarray, "row d_x"]) -> Float[np.ndarray, "row d_y"]:
        """The rows of x as the other stream would hold them, in float64."""
        return x.astype(np.float64) @ self.weight + self.bias

    def r2(self, x: Float[np.ndarray, "row d_x"], y: Float[np.ndarray, "row d_y"]) -> float:
        """Share of y's variance, all dimensions summed, that the map predicts."""
        return _r2(self(x), y)


@dataclass(frozen=True)
class BasisCheck:
    """Held-out R2 of three maps, each freer than the one before."""

    identity_r2: float | None
    """None, as `procrustes_r2`, when the widths differ: there is no such map."""
    procrustes_r2: float | None
    affine_r2: float
    n_fit: int
    n_test: int
    on_all: "BasisCheck | None" = None
    """The same maps judged on test rows among which are those that were left out of the fit; None if not asked."""

    @property
    def gain(self) -> float:
        """What the affine map predicts beyond the raw basis; infinite when there is no raw basis."""
        return np.inf if self.identity_r2 is None else self.affine_r2 - self.identity_r2


def identity_r2(x: Float[np.ndarray, "row d_x"], y: Float[np.ndarray, "row d_y"]) -> float:
    """1 - sum |y - x|^2 / sum |y - mean y|^2: nothing is fitted, so any rows are held out."""
    _check_same_width(x, y, "the identity")
    return _r2(x.astype(np.float64), y)


def fit_affine(x: Float[np.ndarray, "row d_x"], y: Float[np.ndarray, "row d_y"], *, ridge: float) -> AffineMap:
    """Ridge regression of y on x with a free bias.

    Args:
        ridge: penalty in units of the mean variance of x, so that it means the same at every width and
            scale; positive, because residual streams are close to rank-deficient.
    """
    assert ridge > 0, f"ridge is {ridge}; it must be positive"
    x, y = _paired(x, y)
    fit = Ridge(alpha=ridge * len(x) * x.var(axis=0).mean(), solver="cholesky").fit(x, y)
    return AffineMap(fit.coef_.T, fit.intercept_)


def fit_procrustes(x: Float[np.ndarray, "row d_x"], y: Float[np.ndarray, "row d_y"]) -> AffineMap:
    """The rotation (reflections included) and shift that bring x closest to y (Schönemann 1966)."""
    _check_same_width(x, y, "a rotation")
    x, y = _paired(x, y)
    rotation, _ = orthogonal_procrustes(x - x.mean(axis=0), y - y.mean(axis=0))
    return AffineMap(rotation, y.mean(axis=0) - x.mean(axis=0) @ rotation)


def choose_ridge(x: Float[np.ndarray, "row d_x"], y: Float[np.ndarray, "row d_y"]) -> float:
    """The one of `RIDGES` whose map, fitted on the first rows, predicts the last ones best."""
    split = round(len(x) * (1 - CHOOSING_SHARE))
    assert 1 < split < len(x) - 1, f"{len(x)} rows are too few to split"
    return max(RIDGES, key=lambda ridge: fit_affine(x[:split], y[:split], ridge=ridge).r2(x[split:], y[split:]))


def basis_check(
    x_fit: Float[np.ndarray, "fit d_x"],
    y_fit: Float[np.ndarray, "fit d_y"],
    x_test: Float[np.ndarray, "test d_x"],
    y_test: Float[np.ndarray, "test d_y"],
    *,
    every: tuple[Float[np.ndarray, "all d_x"], Float[np.ndarray, "all d_y"]] | None = None,
) -> BasisCheck:
    """R2 on the test rows of the identity, and of a rotation and an affine map fitted on the others.

    Args:
        every: the test rows with those that were left out of them, on which the maps are judged too.
    """
    affine = fit_affine(x_fit, y_fit, ridge=choose_ridge(x_fit, y_fit))
    rotation = fit_procrustes(x_fit, y_fit) if x_fit.shape[1] == y_fit.shape[1] else None

    def judged(x: np.ndarray, y: np.ndarray, on_all: BasisCheck | None = None) -> BasisCheck:
        return BasisCheck(
            identity_r2=None if rotation is None else identity_r2(x, y),
            procrustes_r2=None if rotation is None else rotation.r2(x, y),
            affine_r2=affine.r2(x, y),
            n_fit=len(x_fit),
            n_test=len(x),
            on_all=on_all,
        )

    return judged(x_test, y_test, None if every is None else judged(*every))


def _check_same_width(x: Float[np.ndarray, "row d_x"], y: Float[np.ndarray, "row d_y"], name: str) -> None:
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"{name} needs two residual streams of one width, not {x.shape[1]} and {y.shape[1]}; "
            "an affine map takes any two"
        )


def _paired(
    x: Float[np.ndarray, "row d_x"], y: Float[np.ndarray, "row d_y"]
) -> tuple[Float[np.ndarray, "row d_x"], Float[np.ndarray, "row d_y"]]:
    assert np.isfinite(x).all(), "x holds a NaN or an infinity"
    assert np.isfinite(y).all(), "y holds a NaN or an infinity"
    return x.astype(np.float64), y.astype(np.float64)


def _r2(predicted: Float[np.ndarray, "row d_y"], y: Float[np.ndarray, "row d_y"]) -> float:
    predicted, y = _paired(predicted, y)
    total = np.sum((y - y.mean(axis=0)) ** 2)
    assert total > 0, "y does not vary over these rows: R2 has no meaning"
    return float(1 - np.sum((y - predicted) ** 2) / total)
