"""A TopK dictionary as its equations (Gao et al. 2024, 2406.04093).

pre   = (x - b_dec) @ W_enc + b_enc
f     = relu of the k largest of pre, zero elsewhere
x_hat = f @ W_dec + b_dec
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_steer.errors import InputError
from sae_steer.sae.kernels import SparseCodes, decode_codes, encode_topk


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """The shape of a TopK dictionary."""

    d_in: int
    d_sae: int
    k: int
    dtype: str = "float32"
    architecture: str = "topk"

    def __post_init__(self) -> None:
        if min(self.d_in, self.d_sae, self.k) < 1 or self.k > self.d_sae:
            raise InputError(
                f"a TopK dictionary needs widths above zero and k at most d_sae; "
                f"got d_in {self.d_in}, d_sae {self.d_sae}, k {self.k}"
            )


class TopKSAE(nn.Module):
    """The dictionary: `encode` rows to sparse codes, `decode` codes to rows, call for the reconstruction."""

    def __init__(self, config: TopKConfig) -> None:
        super().__init__()
        self.config = config
        dtype = getattr(torch, config.dtype)
        self.W_enc = nn.Parameter(torch.zeros(config.d_in, config.d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, dtype=dtype))

    def encode(self, x: Float[Tensor, "row d_in"]) -> SparseCodes:
        """f: the k largest pre-activations of each row, those below zero as zero."""
        if x.shape[1] != self.config.d_in:
            raise InputError(
                f"these rows have {x.shape[1]} dimensions and the dictionary reads {self.config.d_in}; "
                f"use the dictionary trained on this model and layer"
            )
        return encode_topk(x, self.W_enc, self.b_enc, self.b_dec, self.config.k)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "row d_in"]:
        """x_hat = f @ W_dec + b_dec."""
        return decode_codes(codes, self.W_dec) + self.b_dec

    def forward(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        """x_hat of x."""
        return self.decode(self.encode(x))

    def activation_of(self, x: Float[Tensor, "row d_in"], feature: int) -> Float[Tensor, " row"]:
        """One feature's value in each row: zero where it is not among the k largest."""
        self._check(feature)
        codes = self.encode(x)
        return (codes.values * (codes.indices == feature)).sum(1)

    def direction(self, feature: int) -> Float[Tensor, " d_in"]:
        """What one unit of the feature adds to a row: W_dec[feature]."""
        self._check(feature)
        return self.W_dec[feature].detach()

    @torch.no_grad()
    def scaled(self, factor: float) -> "TopKSAE":
        """The same dictionary for rows `factor` times as large: scaled(s)(s * x) = s * self(x).

        Only the biases change, so the decoder's rows keep their norms; the codes grow by the factor.
        """
        scaled = TopKSAE(self.config).to(self.W_enc.device)
        scaled.load_state_dict(
            {
                "W_enc": self.W_enc,
                "W_dec": self.W_dec,
                "b_enc": self.b_enc * factor,
                "b_dec": self.b_dec * factor,
            }
        )
        return scaled

    def _check(self, feature: int) -> None:
        if not 0 <= feature < self.config.d_sae:
            raise InputError(
                f"feature {feature} is not in this dictionary; it has features 0 to {self.config.d_sae - 1}"
            )
