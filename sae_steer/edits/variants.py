"""The four interventions of the study: which model each edits, where, how, and which way it should move the measure."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sae_steer.edits.edit import Inject, Subtract, ZeroAblate
from sae_steer.sae.architectures import SparseDictionary


@dataclass(frozen=True)
class Variant:
    """One way to ask what a direction does."""

    name: str
    edits_target: bool
    """Whether the edited model is the target; otherwise the reference."""
    layers_below: int
    """How many blocks below the direction's own the edit stands."""
    predicted_sign: int


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

    def variants(self, upstream: int) -> tuple[Variant, ...]:
        """The interventions that can be made with it: zero-ablation needs a feature."""
        return tuple(v for v in four_variants(upstream) if self.sae is not None or v.name != "zero_ablate")

    def of(
        self, variant: Variant, dose: float, unit: Float[Tensor, " d_model"] | None = None
    ) -> Inject | Subtract | ZeroAblate:
        """The edit of a variant at a dose; `unit` is the direction as carried into the edited stream."""
        if variant.name == "zero_ablate":
            assert self.sae is not None, "only a feature of a dictionary can be ablated"
            assert self.feature is not None, "only a feature of a dictionary can be ablated"
            return ZeroAblate(self.sae, self.feature, dose)
        kind = Subtract if variant.predicted_sign < 0 else Inject
        return kind(self.unit if unit is None else unit, dose * self.s)


def four_variants(upstream: int) -> tuple[Variant, ...]:
    """Inject, subtract, zero-ablate, and inject `upstream` blocks earlier."""
    return (
        Variant("inject", edits_target=False, layers_below=0, predicted_sign=+1),
        Variant("subtract", edits_target=True, layers_below=0, predicted_sign=-1),
        Variant("zero_ablate", edits_target=True, layers_below=0, predicted_sign=-1),
        Variant("upstream", edits_target=False, layers_below=upstream, predicted_sign=+1),
    )
