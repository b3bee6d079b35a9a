"""Directions that are not the one studied: what any vector of that size does to the measure.

isotropic         uniform on the sphere
covariance        drawn from the covariance of the edited stream at onsets: vectors that look like what the model writes
matched features  decoder rows of other features nearest in firing rate and size, without those specific to the
                  target model or with |cosine| above .3 to the direction: a control family that holds 7.6 % of real
                  effects loses half of the rank test's power (sim)

All are of length one; the edit studied gives them the length it moves each row by.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.edits.variants import Direction
from sae_steer.randomness import Stream, generator, random_numbers
from sae_steer.sae.architectures import SparseDictionary

ISOTROPIC, COVARIANCE, MATCHED = "isotropic", "covariance", "matched features"
UNKNOWN_COLOR = "#8a6fa8"
"""Of a family that another version drew."""
MAX_COSINE = 0.3
SPECIFIC_RATE, SPECIFIC_RATIO = 0.01, 10.0
"""What counts as specific on the tune split, where no scan says it."""
CHUNK = 8_192


@dataclass(frozen=True)
class FiringProfile:
    """How often each feature of a dictionary fires, and how large it is where it does."""

    rate: Float[np.ndarray, " d_sae"]
    size: Float[np.ndarray, " d_sae"]
    """Mean absolute value where active, times the length of the decoder row; 0 for a silent feature."""

    @classmethod
    @torch.no_grad()
    def of(cls, sae: SparseDictionary, rows: Float[Tensor, "row d_model"]) -> "FiringProfile":
        """Counted over rows of the stream the dictionary reads."""
        fired, total = np.zeros((2, sae.config.d_sae))
        for chunk in rows.split(CHUNK):
            codes = sae.encode(chunk)
            fired += codes.firings.cpu().numpy()
            total += np.bincount(codes.indices.cpu(), codes.values.abs().double().cpu(), sae.config.d_sae)
        size = np.divide(total, fired, out=np.zeros(len(total)), where=fired > 0)
        return cls(fired / len(rows), size * decoder_rows(sae).double().norm(dim=1).cpu().numpy())


def decoder_rows(sae: SparseDictionary) -> Float[Tensor, "d_sae d_model"]:
    """What one unit of each feature adds to a row."""
    return torch.stack([sae.direction(feature) for feature in range(sae.config.d_sae)])


def specific_features(target: FiringProfile, reference: FiringProfile) -> Int[np.ndarray, " feature"]:
    """Features that fire at 1 % of the target's rows and ten times as often as in the reference's."""
    return np.flatnonzero((target.rate >= SPECIFIC_RATE) & (target.rate >= SPECIFIC_RATIO * reference.rate))


def matched_features(
    direction: Direction,
    decoder: Float[Tensor, "d_sae d_model"],
    profile: FiringProfile,
    *,
    leave_out: Collection[int],
    count: int,
    seed: int,
) -> Int[np.ndarray, " feature"]:
    """Up to `count` features nearest the direction's in log firing rate and log size, in an order fixed by seed.

    For a direction that is no feature, those nearest the median of the features that fire.
    """
    rows = decoder.double().cpu()
    cosine = (rows @ direction.unit.double().cpu() / rows.norm(dim=1).clamp_min(1e-12)).abs().numpy()
    eligible = (profile.rate > 0) & (cosine <= MAX_COSINE)
    eligible[[*leave_out, *([] if direction.feature is None else [direction.feature])]] = False
    alive = profile.rate > 0
    traits = np.log(np.stack([profile.rate, profile.size], axis=1).clip(1e-12))
    if direction.feature is None or not alive[direction.feature]:
        wanted = np.median(traits[alive], axis=0) if alive.any() else traits.mean(axis=0)
    else:
        wanted = traits[direction.feature]
    spread = traits[alive].std(axis=0).clip(1e-9) if alive.any() else 1.0
    distance = (((traits - wanted) / spread) ** 2).sum(axis=1)
    candidates = np.flatnonzero(eligible)
    nearest = candidates[np.argsort(distance[candidates], kind="stable")][:count]
    return random_numbers(seed, Stream.MATCHED_ORDER).permutation(nearest)


def covariance_matched(rows: Float[np.ndarray, "row d_model"], count: int, seed: int) -> Float[Tensor, "count d_model"]:
    """Directions of length one drawn from the normal distribution with the rows' covariance."""
    values, vectors = np.linalg.eigh(np.cov(rows.astype(np.float64), rowvar=False))
    root = torch.from_numpy(vectors * np.sqrt(values.clip(min=0))).float()
    drawn = torch.randn(count, rows.shape[1], generator=generator(seed, Stream.COVARIANCE_CONTROLS)) @ root.T
    return drawn / drawn.norm(dim=-1, keepdim=True)


def isotropic(count: int, d_model: int, generator: torch.Generator) -> Float[Tensor, "count d_model"]:
    """Directions of length one, uniform on the sphere."""
    drawn = torch.randn(count, d_model, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class DrawnFrom:
    """What one arm's control directions are drawn from."""

    stream: Float[np.ndarray, "onset d_model"]
    """The edited stream at onsets of the tune texts."""
    matched: Float[Tensor, "row d_model"] | None
    """Decoder rows of other features, carried into the edited stream; None without a dictionary."""
    seed: int


class Family(ABC):
    """A kind of control direction. A further one is one class here, in `FAMILIES`."""

    name: ClassVar[str]
    color: ClassVar[str]
    """Of its histogram."""

    @abstractmethod
    def draw(self, source: DrawnFrom, count: int) -> Float[Tensor, "_direction d_model"] | None:
        """`count` directions of length one, or as many as there are; None where it has none."""


class Isotropic(Family):
    """Uniform on the sphere."""

    name, color = ISOTROPIC, "#9a9a9a"

    def draw(self, source: DrawnFrom, count: int) -> Float[Tensor, "_direction d_model"]:
        """From the seed alone."""
        return isotropic(count, source.stream.shape[1], generator(source.seed, Stream.ISOTROPIC_CONTROLS))


class CovarianceMatched(Family):
    """Like what the model writes at onsets."""

    name, color = COVARIANCE, "#6fa8c9"

    def draw(self, source: DrawnFrom, count: int) -> Float[Tensor, "_direction d_model"]:
        """From the covariance of the stream."""
        return covariance_matched(source.stream, count, source.seed)


class MatchedFeatures(Family):
    """Other features that fire as often and as far."""

    name, color = MATCHED, "#c9a86f"

    def draw(self, source: DrawnFrom, count: int) -> Float[Tensor, "_direction d_model"] | None:
        """Those that were chosen beforehand."""
        return source.matched


FAMILIES: tuple[Family, ...] = (Isotropic(), CovarianceMatched(), MatchedFeatures())
"""In the order in which they are drawn and shown."""


def color_of_family(name: str) -> str:
    """Of a family's histogram."""
    return next((family.color for family in FAMILIES if family.name == name), UNKNOWN_COLOR)
