"""The losses of a TopK dictionary (Gao et al. 2024, 2406.04093, sections 2.3 and A.2), as pure functions.

mse  = mean over rows of ||x - x_hat||^2
auxk = ||e - e_hat||^2 / ||e - mean(e)||^2,  e = x - x_hat held fixed,
       e_hat = the reconstruction of e by the aux_k largest pre-activations among dead features
"""

from jaxtyping import Float
from torch import Tensor

_TINY = 1e-30  # an error that is reconstructed exactly has no variance to divide by


def reconstruction_mse(x: Float[Tensor, "row d"], x_hat: Float[Tensor, "row d"]) -> Float[Tensor, ""]:
    """||x - x_hat||^2, summed over dimensions and averaged over rows."""
    return (x - x_hat).square().sum(1).mean()


def auxk_loss(error: Float[Tensor, "row d"], error_hat: Float[Tensor, "row d"]) -> Float[Tensor, ""]:
    """The share of the error's variance that dead features leave unexplained; no gradient to the error."""
    error = error.detach()
    variance = (error - error.mean(0)).square().sum()
    return (error - error_hat).square().sum() / variance.clamp_min(_TINY)
