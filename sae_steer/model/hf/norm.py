"""What a final norm is, found by what it puts out:

    norm(x) = gain * (x - mean(x) [if it centres]) / sqrt(mean(that^2) + eps) + bias

so that a change of the stream can be read with the norm's divisor held where it was.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_steer.errors import InputError


@dataclass(frozen=True)
class FinalNorm:
    """A norm's equation."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centres: bool
    eps: float

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.Module, d_model: int, like: Tensor) -> "FinalNorm":
        """The equation of `norm`, a module; what follows none is an `InputError`.

        Args:
            like: a tensor of the norm's type and device.
        """

        def put_out(rows: Tensor) -> Tensor:
            return norm(rows.to(like.dtype)[None])[0].float()

        one = torch.ones(1, d_model, device=like.device)
        bias = put_out(0 * one)[0]
        centres = bool((put_out(64 * one)[0] - bias).norm() < 0.5 * (put_out(64 * _alternating(one))[0] - bias).norm())
        rows = 64 * _alternating(one)
        rows = rows - rows.mean() if centres else rows
        gain = (put_out(rows)[0] - bias) * rows[0].square().mean().sqrt() / rows[0]
        small = rows / 64 * 1e-3
        shrunk = (put_out(small)[0] - bias).norm() / (gain * small[0] / small[0].square().mean().sqrt()).norm()
        eps = max(float(small[0].square().mean() * (shrunk**-2 - 1)), 0.0)
        found = cls(gain, bias, centres, eps)
        tried = torch.linspace(-3, 5, 4 * d_model, device=like.device).cos().view(4, d_model).cumsum(0)
        off = (found(tried) - put_out(tried)).norm() / put_out(tried).norm()
        if not off <= (1e-3 if like.dtype == torch.float32 else 3e-2):
            raise InputError(
                f"a {type(norm).__name__} after the last block is no root-mean-square norm and no layer norm (off by "
                f"{float(off):.2g}); such a model cannot be a model of a pair"
            )
        return found

    def __call__(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The norm of `resid`."""
        return self.frozen(resid, torch.zeros_like(resid))

    def frozen(
        self, resid: Float[Tensor, "*rows d_model"], change: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """The norm of resid + change, divided by what the norm divides `resid` by."""
        gain, bias = self.gain.to(resid.device), self.bias.to(resid.device)  # the model may have moved since
        scale = (self._centred(resid).square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return self._centred(resid + change) * scale * gain + bias

    def _centred(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        return rows - rows.mean(-1, keepdim=True) if self.centres else rows


def _alternating(one: Tensor) -> Tensor:
    sign = torch.ones_like(one)
    sign[:, 1::2] = -1
    return sign
