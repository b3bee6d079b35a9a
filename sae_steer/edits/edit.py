"""Interventions as values: each takes residual rows and returns edited ones. Strength zero is the identity.

Every dictionary edit adds the change of the feature's own contribution, resid + (f_new - f_old) * W_dec[f],
so the part of the stream the dictionary does not explain stays as it was.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import Lock

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.model.language_model import LanguageModel
from sae_steer.model.replay import Edit
from sae_steer.sae.architectures import SparseDictionary


@dataclass(frozen=True)
class Inject:
    """h + strength * direction, at every row."""

    direction: Float[Tensor, " d_model"]
    strength: float

    def __call__(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The rows with the direction added."""
        return resid + self.strength * self.direction


@dataclass(frozen=True)
class Subtract:
    """h - strength * direction, at every row, whether the feature fires there or not."""

    direction: Float[Tensor, " d_model"]
    strength: float

    def __call__(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The rows with the direction taken away."""
        return resid - self.strength * self.direction


@dataclass(frozen=True)
class ZeroAblate:
    """h - strength * f(h) * W_dec[f]: at strength one the feature's contribution is gone, where it fires."""

    sae: SparseDictionary
    feature: int
    strength: float = 1.0

    def __call__(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The rows with the feature's contribution scaled away; rows where it is silent are untouched."""
        active = self.sae.activation_of(resid.reshape(-1, resid.shape[-1]), self.feature).reshape(resid.shape[:-1])
        return resid - self.strength * active[..., None] * self.sae.direction(self.feature)


@dataclass(frozen=True)
class AblateGroup:
    """h - strength * sum over the group of f(h) * W_dec[f]: at strength one all its contributions are gone."""

    sae: SparseDictionary
    features: tuple[int, ...]
    strength: float = 1.0

    def __call__(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The rows without the group; rows where all of it is silent are untouched."""
        codes = self.sae.encode(resid.reshape(-1, resid.shape[-1]))
        active = torch.stack([codes.of_feature(feature) for feature in self.features], dim=1)
        written = active @ torch.stack([self.sae.direction(feature) for feature in self.features])
        return resid - self.strength * written.reshape(resid.shape)


@dataclass
class Remembered:
    """An edit that keeps what it made of the last rows: the controls of an ablation all ask for the same."""

    edit: Edit
    _kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The edit's own."""
        kept = self._kept  # another thread may replace it
        if kept is None or not torch.equal(kept[0], resid):
            self._kept = kept = resid, self.edit(resid)
        return kept[1]


@dataclass(frozen=True)
class Control:
    """`edit`'s change of every row, turned into another direction at the same length."""

    edit: Edit
    direction: Float[Tensor, " d_model"]
    """Of length one."""

    def __call__(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The rows moved as far as `edit` would, along `direction`."""
        return resid + (self.edit(resid) - resid).norm(dim=-1, keepdim=True) * self.direction


@dataclass(frozen=True)
class Fan:
    """Many controls of one edit at once: copy i of a row is moved `scales[i]` times as far as `edit` would."""

    edit: Edit
    directions: Float[Tensor, "direction d_model"]
    """Of length one."""
    scales: Float[Tensor, " direction"]

    def __len__(self) -> int:
        return len(self.directions)

    def lengths(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
        """How far `edit` moves each row."""
        return (self.edit(resid) - resid).norm(dim=-1)

    def __call__(
        self, resid: Float[Tensor, " d_model"], length: Float[Tensor, ""]
    ) -> Float[Tensor, "direction d_model"]:
        """The copies of one row."""
        return resid + (length * self.scales)[:, None] * self.directions


@dataclass
class Donor:
    """A model whose stream is patched into another; the stream of the last texts is kept, for all that read it."""

    model: LanguageModel
    layer: int
    _kept: tuple[Tensor, Tensor] | None = None
    _alone: AbstractContextManager = field(default_factory=Lock, repr=False, compare=False)
    """Several threads read one donor; TransformerLens caches in one at a time."""

    @torch.no_grad()
    def stream(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Of `tokens`, after block `layer`."""
        with self._alone:
            if self._kept is None or not torch.equal(self._kept[0], tokens):
                streams = self.model.resid_posts(tokens.to(self.model.device), (self.layer,))[self.layer]
                self._kept = tokens, streams
            return self._kept[1]


@dataclass(frozen=True)
class Patch:
    """The stream of another model at the same tokens, carried into this one's: the largest edit that means anything."""

    donor: Donor
    carry: Callable[[Tensor], Tensor]
    """The donor's stream -> this model's."""

    def stream(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """What replaces the stream, at every position."""
        return self.carry(self.donor.stream(tokens))
