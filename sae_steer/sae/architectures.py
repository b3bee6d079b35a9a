"""Dictionaries as their equations, for reading rows; how each is learned is in `training`.

pre   = (x - b_dec) @ W_enc + b_enc
f     = TopK      relu of the k largest of pre, zero elsewhere (Gao et al. 2024, 2406.04093)
        JumpReLU  relu(pre) where pre > threshold, zero elsewhere (Rajamanoharan et al. 2024, 2407.14435)
x_hat = f @ W_dec + b_dec

BatchTopK and Matryoshka BatchTopK (Bussmann et al. 2024, 2412.06410; 2025, 2503.17547) differ in training
alone: a dictionary learned with either is read as a JumpReLU with one threshold for all features.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_steer.errors import InputError
from sae_steer.sae.codes import SparseCodes
from sae_steer.sae.origin import Origin

SLAB = 1024
"""Rows whose pre-activations exist at once: 8 MB at d_sae 4096 stay in cache (45 ms a batch against 54)."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The shape of a dictionary."""

    d_in: int
    d_sae: int
    dtype: str = "float32"
    architecture: str

    def __post_init__(self) -> None:
        if min(self.d_in, self.d_sae) < 1:
            raise InputError(f"a dictionary needs widths above zero; got d_in {self.d_in}, d_sae {self.d_sae}")


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    """The shape of a TopK dictionary."""

    k: int
    architecture: str = "topk"

    def __post_init__(self) -> None:
        if min(self.d_in, self.d_sae, self.k) < 1 or self.k > self.d_sae:
            raise InputError(
                f"a TopK dictionary needs widths above zero and k at most d_sae; "
                f"got d_in {self.d_in}, d_sae {self.d_sae}, k {self.k}"
            )


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(SAEConfig):
    """The shape of a JumpReLU dictionary."""

    architecture: str = "jumprelu"


@runtime_checkable
class SparseDictionary(Protocol):
    """What scan, interventions and evaluation ask of a dictionary, ours or a SAELens one."""

    config: SAEConfig

    def encode(self, x: Float[Tensor, "row d_in"]) -> SparseCodes:
        """f of each row."""

    def decode(self, codes: SparseCodes) -> Float[Tensor, "row d_in"]:
        """x_hat of codes."""

    def __call__(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        """x_hat of rows."""

    def activation_of(self, x: Float[Tensor, "row d_in"], feature: int) -> Float[Tensor, " row"]:
        """One feature's value in each row; `InputError` for a feature it does not have."""

    def direction(self, feature: int) -> Float[Tensor, " d_in"]:
        """What one unit of the feature adds to a row; `InputError` for a feature it does not have."""


def on_device(sae: SparseDictionary, device: torch.device) -> SparseDictionary:
    """`sae` itself if it lies on `device`, or a copy of it there."""
    here = next(iter(sae.state_dict().values())).device
    there = here.type == device.type and device.index in (None, here.index)
    return sae if there else deepcopy(sae).to(device)


class LinearSAE(nn.Module):
    """A dictionary with one encoder and one decoder matrix; what fires is left to `_select`."""

    config: SAEConfig
    origin: Origin = Origin()
    """What its file says of where it was trained."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        dtype = getattr(torch, config.dtype)
        self.W_enc = nn.Parameter(torch.zeros(config.d_in, config.d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, dtype=dtype))

    def _select(self, pre: Float[Tensor, "row d_sae"]) -> SparseCodes:
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "row d_in"]) -> SparseCodes:
        """f of each row, at the precision of the surrounding `world.compute()`; no gradient.

        Weights or rows of 16 bits are widened: rounded sums would let other features fire.
        """
        if x.shape[1] != self.config.d_in:
            raise InputError(
                f"these rows have {x.shape[1]} dimensions and the dictionary reads {self.config.d_in}; "
                f"use the dictionary trained on this model and layer"
            )
        wide = torch.promote_types(torch.promote_types(x.dtype, self.W_enc.dtype), torch.float32)
        W_enc, b_enc = self.W_enc.to(wide), self.b_enc.to(wide)
        slabs = (x.to(wide) - self.b_dec.to(wide)).split(SLAB)
        codes = SparseCodes.joined([self._select(torch.addmm(b_enc, slab, W_enc).to(wide)) for slab in slabs])
        return replace(codes, values=codes.values.to(x))

    @torch.no_grad()
    def decode(self, codes: SparseCodes) -> Float[Tensor, "row d_in"]:
        """x_hat = f @ W_dec + b_dec."""
        return codes.weighted_sum(self.W_dec.to(codes.values)) + self.b_dec.to(codes.values)

    def forward(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        """x_hat of x."""
        return self.decode(self.encode(x))

    def activation_of(self, x: Float[Tensor, "row d_in"], feature: int) -> Float[Tensor, " row"]:
        """One feature's value in each row: zero where it does not fire."""
        self._check(feature)
        return self.encode(x).of_feature(feature)

    def direction(self, feature: int) -> Float[Tensor, " d_in"]:
        """What one unit of the feature adds to a row: W_dec[feature], in float32 at least."""
        self._check(feature)
        row = self.W_dec[feature].detach()
        return row.to(torch.promote_types(row.dtype, torch.float32))

    @torch.no_grad()
    def scaled(self, factor: float) -> "LinearSAE":
        """The same dictionary for rows `factor` times as large: scaled(s)(s * x) = s * self(x).

        Biases and thresholds change and weights do not, so the decoder's rows keep their norms; the codes grow
        by the factor.
        """
        scaled = type(self)(self.config).to(self.W_enc.device)
        weights = ("W_enc", "W_dec")
        scaled.load_state_dict(
            {name: value if name in weights else value * factor for name, value in self.state_dict().items()}
        )
        return scaled

    def _check(self, feature: int) -> None:
        if not 0 <= feature < self.config.d_sae:
            raise InputError(
                f"feature {feature} is not in this dictionary; it has features 0 to {self.config.d_sae - 1}"
            )


class TopKSAE(LinearSAE):
    """The k largest pre-activations of each row, those below zero as zero."""

    config: TopKConfig

    def _select(self, pre: Float[Tensor, "row d_sae"]) -> SparseCodes:
        k = self.config.k
        top = pre.topk(k, dim=1, sorted=False)
        starts = torch.arange(0, k * len(pre) + 1, k, device=pre.device)
        return SparseCodes(top.values.relu().flatten(), top.indices.flatten(), starts, pre.shape[1])


class JumpReLUSAE(LinearSAE):
    """The pre-activations above zero and above their feature's threshold."""

    config: JumpReLUConfig

    def __init__(self, config: JumpReLUConfig) -> None:
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros_like(self.b_enc))

    def _select(self, pre: Float[Tensor, "row d_sae"]) -> SparseCodes:
        return SparseCodes.where(pre > self.threshold.clamp_min(0), pre)
