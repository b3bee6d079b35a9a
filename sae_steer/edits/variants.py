"""The interventions of the study, each with all that is its own: where it edits, how, which way it should move things.

inject       reference   + dose * s * unit                       where the direction stands
subtract     target      - dose * s * unit                       at every chosen position, firing or not
zero-ablate  target      - dose * f(x) * W_dec[f]                where f fires, error kept
upstream     reference   the injection, some blocks earlier

A further variant is one class here, in `VARIANTS`, and its truth in `selftest.kinds`. What a variant should do is
written twice and apart: `edit` as it is done, `intended` as it is checked (gate 2).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae_steer.edits.edit import Inject, Subtract, ZeroAblate
from sae_steer.model.replay import Edit
from sae_steer.sae.architectures import SparseDictionary


@dataclass(frozen=True)
class Direction:
    """What is added to a stream or taken from it: a unit vector of the target's stream, and the size of dose 1."""

    name: str
    unit: Float[Tensor, " d_model"]
    """Of length one."""
    s: float
    """Length of dose 1; for a feature the median norm of its active contribution."""
    s_from: str
    """Where `s` comes from."""
    sae: SparseDictionary | None = None
    """The dictionary, if the direction is one of its features."""
    feature: int | None = None

    @property
    def of_dictionary(self) -> tuple[SparseDictionary, int]:
        """The dictionary and the feature's index in it, of a direction that is a feature."""
        assert self.sae is not None, "only a feature of a dictionary can be edited by what it contributes"
        assert self.feature is not None, "only a feature of a dictionary can be edited by what it contributes"
        return self.sae, self.feature

    def variants(self, upstream: int) -> "tuple[Variant, ...]":
        """The interventions that can be made with it: some need a feature."""
        return tuple(v for v in all_variants(upstream) if self.sae is not None or not v.needs_feature)


@dataclass(frozen=True)
class Variant(ABC):
    """One way to ask what a direction does."""

    layers_below: int = 0
    """How many blocks below the direction's own the edit stands."""

    name: ClassVar[str]
    edits_target: ClassVar[bool]
    """Whether the edited model is the target; otherwise the reference."""
    predicted_sign: ClassVar[int]
    """Which way it should move the measure."""
    needs_feature: ClassVar[bool] = False
    """Whether it changes what a feature contributes, as far as it fires: of a bare direction it cannot be made."""
    title: ClassVar[str]
    """In a heading, before the name of the edited model."""
    released: ClassVar[str]
    """In the released study's files."""

    @classmethod
    def at(cls, upstream: int) -> "Variant":
        """The variant in a study whose upstream edits stand so many blocks below."""
        return cls()

    @abstractmethod
    def edit(self, direction: Direction, dose: float, unit: Float[Tensor, " d_model"]) -> Edit:
        """The edit at a dose; `unit` is the direction as carried into the edited stream."""

    @abstractmethod
    def intended(
        self,
        direction: Direction,
        dose: float,
        unit: Float[Tensor, " d_model"],
        before: Float[Tensor, "row d_model"],
    ) -> Float[Tensor, "row d_model"]:
        """The change it should make of each row, written apart from the edit itself."""


class InjectIntoReference(Variant):
    """The direction added to the reference."""

    name, edits_target, predicted_sign = "inject", False, +1
    title, released = "injected into", "inject_into_reference"

    def edit(self, direction: Direction, dose: float, unit: Float[Tensor, " d_model"]) -> Edit:
        """h + dose * s * unit."""
        return Inject(unit, dose * direction.s)

    def intended(
        self,
        direction: Direction,
        dose: float,
        unit: Float[Tensor, " d_model"],
        before: Float[Tensor, "row d_model"],
    ) -> Float[Tensor, "row d_model"]:
        """The same step at every row, upwards."""
        return (dose * direction.s * unit).expand_as(before)


class SubtractFromTarget(Variant):
    """The direction taken from the target, whether the feature fires or not."""

    name, edits_target, predicted_sign = "subtract", True, -1
    title, released = "subtracted in", "subtract_from_target"

    def edit(self, direction: Direction, dose: float, unit: Float[Tensor, " d_model"]) -> Edit:
        """h - dose * s * unit."""
        return Subtract(unit, dose * direction.s)

    def intended(
        self,
        direction: Direction,
        dose: float,
        unit: Float[Tensor, " d_model"],
        before: Float[Tensor, "row d_model"],
    ) -> Float[Tensor, "row d_model"]:
        """The same step at every row, downwards."""
        return (-dose * direction.s * unit).expand_as(before)


class AblateInTarget(Variant):
    """The feature's own contribution taken away in the target, where it fires."""

    name, edits_target, predicted_sign, needs_feature = "zero_ablate", True, -1, True
    title, released = "zero-ablated in", "zero_ablate_in_target"

    def edit(self, direction: Direction, dose: float, unit: Float[Tensor, " d_model"]) -> Edit:
        """h - dose * f(h) * W_dec[f]."""
        sae, feature = direction.of_dictionary
        return ZeroAblate(sae, feature, dose)

    def intended(
        self,
        direction: Direction,
        dose: float,
        unit: Float[Tensor, " d_model"],
        before: Float[Tensor, "row d_model"],
    ) -> Float[Tensor, "row d_model"]:
        """As much of the decoder row as the feature is active."""
        sae, feature = direction.of_dictionary
        return -dose * sae.activation_of(before, feature)[:, None] * sae.direction(feature)


class InjectUpstream(InjectIntoReference):
    """The injection, some blocks below the direction's own."""

    name = "upstream"
    title, released = "injected upstream in", "inject_upstream"

    @classmethod
    def at(cls, upstream: int) -> "InjectUpstream":
        """So many blocks below."""
        return cls(layers_below=upstream)


VARIANTS: tuple[type[Variant], ...] = (InjectIntoReference, SubtractFromTarget, AblateInTarget, InjectUpstream)
"""In the order in which they are made and shown."""


def all_variants(upstream: int) -> tuple[Variant, ...]:
    """Every variant, the upstream one `upstream` blocks below."""
    return tuple(kind.at(upstream) for kind in VARIANTS)


def variant_named(name: str) -> type[Variant] | None:
    """The variant of a name; None for one that another version made."""
    return next((kind for kind in VARIANTS if kind.name == name), None)
