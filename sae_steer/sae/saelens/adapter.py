"""A sae_lens dictionary seen as a `SparseDictionary`.

1. A code times the feature's direction is what the feature adds to the row, whatever the dictionary does inside:
   where codes are scaled by decoder norms the direction has norm one, and where each row is normalised
   (`layer_norm`, `constant_norm_rescale`) the codes carry the row's own scale.
2. Refused, because rows of one residual stream are not what they read or write: transcoders, dictionaries of
   attention heads (`hook_z`), and temporal ones, whose codes depend on the text before.

sae_lens is imported when called: that takes seconds.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_steer.errors import InputError
from sae_steer.sae.architectures import SLAB, SAEConfig
from sae_steer.sae.codes import SparseCodes
from sae_steer.sae.origin import Origin

_ROW_NORMS = ("layer_norm", "constant_norm_rescale")
_KEEPS_SCALES = Lock()


def sae_lens() -> ModuleType:
    """The package, imported on first need without its dependencies' deprecation warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens

    return sae_lens


class SAELensDictionary(nn.Module):
    """A sae_lens dictionary of any inference architecture that reads and writes rows of one stream."""

    def __init__(self, inner: nn.Module, name: str, origin: Origin | None = None) -> None:
        """`inner` is kept, not copied; `origin` None takes what its own metadata says."""
        super().__init__()
        facts = inner.cfg
        _check_usable(facts, name)
        self.inner, self.name = inner.requires_grad_(False), name
        self.origin = Origin.of(facts.to_dict()) if origin is None else origin
        self.config = SAEConfig(
            d_in=facts.d_in, d_sae=facts.d_sae, dtype=facts.dtype.removeprefix("torch."),
            architecture=f"saelens:{facts.architecture()}",
        )  # fmt: skip

    def to(self, *arguments: Any, **options: Any) -> "SAELensDictionary":
        """Moved by SAELens itself, which remembers where it is."""
        self.inner.to(*arguments, **options)
        return self

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "row d_in"]) -> SparseCodes:
        """f of each row; codes below zero (`abstopk`) are kept."""
        if x.shape[1] != self.config.d_in:
            raise InputError(
                f"these rows have {x.shape[1]} dimensions and the dictionary reads {self.config.d_in}; "
                "use the dictionary trained on this model and layer"
            )
        with self._alone():
            return SparseCodes.joined([self._encode_slab(slab) for slab in x.split(SLAB)])

    def _alone(self) -> AbstractContextManager:
        """One thread at a time where rows are normalised: sae_lens keeps their scales on the module between calls."""
        return _KEEPS_SCALES if self.inner.cfg.normalize_activations in _ROW_NORMS else nullcontext()

    def _encode_slab(self, x: Float[Tensor, "row d_in"]) -> SparseCodes:
        f = self.inner.encode(x).to(x)
        if self.inner.cfg.normalize_activations in _ROW_NORMS:
            zero, unit = torch.zeros_like(x), torch.ones_like(x)
            f = f * (self._undo_norm(x, unit) - self._undo_norm(x, zero))[:, :1]
        return SparseCodes.where(f != 0, f)

    def _undo_norm(self, x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        """What `y`, in the units of the normalised rows x, is in the stream: an affine map of its own for each row."""
        self.inner.run_time_activation_norm_fn_in(x)  # sae_lens keeps the row's scale between the two calls
        return self.inner.run_time_activation_norm_fn_out(y)

    @torch.no_grad()
    def decode(self, codes: SparseCodes) -> Float[Tensor, "row d_in"]:
        """x_hat of codes."""
        if self.inner.cfg.normalize_activations in _ROW_NORMS:
            raise InputError(
                f"{self.name} normalises each row ({self.inner.cfg.normalize_activations}), so codes alone do not "
                "give the row back; call the dictionary on the rows"
            )
        nothing = torch.zeros(1, self.config.d_sae, dtype=self.inner.dtype, device=self.inner.device)
        return codes.weighted_sum(self.directions.to(codes.values)) + self.inner.decode(nothing).to(codes.values)

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        """x_hat of rows, by sae_lens."""
        with self._alone():
            return torch.cat([self.inner(slab).to(x) for slab in x.split(SLAB)])

    def activation_of(self, x: Float[Tensor, "row d_in"], feature: int) -> Float[Tensor, " row"]:
        """One feature's value in each row: zero where it does not fire."""
        self._check(feature)
        return self.encode(x).of_feature(feature)

    def direction(self, feature: int) -> Float[Tensor, " d_in"]:
        """What one unit of the feature adds to a row."""
        self._check(feature)
        return self.directions[feature].detach()

    @property
    def directions(self) -> Float[Tensor, "d_sae d_in"]:
        """What one unit of each feature adds to a row."""
        W_dec = self.inner.W_dec.detach()
        rescaled = getattr(self.inner.cfg, "rescale_acts_by_decoder_norm", False)
        return W_dec / W_dec.norm(dim=-1, keepdim=True) if rescaled else W_dec

    def facts(self) -> dict[str, Any]:
        """Its cfg.json, as SAELens writes it."""
        return self.inner.cfg.to_dict() | {"device": "cpu"}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Its weights under SAELens's own names."""
        return self.inner.state_dict()

    def _check(self, feature: int) -> None:
        if not 0 <= feature < self.config.d_sae:
            raise InputError(
                f"feature {feature} is not in this dictionary; it has features 0 to {self.config.d_sae - 1}"
            )


def _check_usable(facts, name: str) -> None:
    kind = facts.architecture()
    reason = None
    if "transcoder" in kind:
        reason = "reads one site and writes another"
    elif kind == "temporal":
        reason = "reads whole texts, not rows"
    elif facts.reshape_activations != "none":
        reason = f"reads attention heads ({facts.reshape_activations})"
    elif facts.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        reason = f"was trained on rows changed by {facts.normalize_activations}, and does not hold that change"
    if reason:
        raise InputError(
            f"{name} is of architecture '{kind}' and {reason}; give a dictionary of the residual stream's raw rows"
        )
