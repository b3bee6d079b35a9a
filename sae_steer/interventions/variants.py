"""The four interventions of the study: which model each edits, where, how, and which way it should move the measure."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sae_steer.interventions.edits import Inject, Subtract, ZeroAblate
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.sae.architectures import SparseDictionary


@dataclass(frozen=True)
class Variant:
    """One way to ask what a feature does."""

    name: str
    edits_target: bool
    """Whether the edited model is the target; otherwise the reference."""
    layers_below: int
    """How many blocks below the dictionary's the edit stands."""
    predicted_sign: int

    def model(self, pair: ModelPair) -> NamedModel:
        """The model the variant edits."""
        return pair.target if self.edits_target else pair.reference


@dataclass(frozen=True)
class FeatureEdit:
    """A feature and its size, from which every variant's edits are made."""

    sae: SparseDictionary
    feature: int
    s: float
    """Median norm of the feature's active contribution: what dose 1 adds or takes."""

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        """The decoder row at length one."""
        direction = self.sae.direction(self.feature)
        return direction / direction.norm()

    def of(self, variant: Variant, dose: float) -> Inject | Subtract | ZeroAblate:
        """The edit of a variant at a dose."""
        if variant.name == "zero_ablate":
            return ZeroAblate(self.sae, self.feature, dose)
        kind = Subtract if variant.predicted_sign < 0 else Inject
        return kind(self.unit, dose * self.s)


def four_variants(upstream: int) -> tuple[Variant, ...]:
    """Inject, subtract, zero-ablate, and inject `upstream` blocks earlier."""
    return (
        Variant("inject", edits_target=False, layers_below=0, predicted_sign=+1),
        Variant("subtract", edits_target=True, layers_below=0, predicted_sign=-1),
        Variant("zero_ablate", edits_target=True, layers_below=0, predicted_sign=-1),
        Variant("upstream", edits_target=False, layers_below=upstream, predicted_sign=+1),
    )
