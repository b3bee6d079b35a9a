"""What a dictionary rule is: how it chooses the codes of a batch, what it asks of a loss, and what it is stored as.

A rule is a frozen dataclass whose fields are its knobs, each with its range and a default. Only `choose` and `stored`
must be written; what else the learner asks has an answer here that fits most rules.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae_steer.arguments import Checked
from sae_steer.sae.architectures import LinearSAE
from sae_steer.sae.kernels.portable import RowCodes
from sae_steer.world import World


@dataclass(frozen=True)
class Batch:
    """What a rule chooses from: standardised rows, and the encoder at the precision of its product."""

    x: Float[Tensor, "row d_in"]
    W: Float[Tensor, "d_sae d_in"]
    bias: Float[Tensor, " d_sae"]
    """b_enc less what b_dec takes away: a pre-activation is x . W + bias."""
    k: int
    """Codes a row at this step."""
    final_k: int
    """Codes a row once k has fallen to its value."""
    threshold: Float[Tensor, " d_sae"]
    """The learner's; a rule that learns it without a gradient changes it in place."""
    is_first: bool
    """Whether no step was taken yet."""
    engine: ModuleType
    """The kernels that fit the device: `portable` or `cpu`."""
    world: World

    @property
    def rows(self) -> int:
        """Rows of the batch, of all processes together."""
        return len(self.x) * self.world.size


ThresholdGradient = Callable[[Float[Tensor, "row d_in"], Float[Tensor, "d_sae d_in"]], Float[Tensor, " d_sae"]]


@dataclass(frozen=True)
class Chosen:
    """The codes of a batch."""

    codes: RowCodes
    threshold_gradient: ThresholdGradient | None = None
    """The gradient to the thresholds, of the gradient to the reconstruction and W_dec, where they are learned so."""


@dataclass(frozen=True)
class Rule(Checked):
    """How a dictionary's codes are chosen while it is learned, and what reads it afterwards."""

    row_alone: ClassVar[bool] = False
    """Whether each row has its k codes whatever the others have: they may then be looked for in int8, and a step on
    a GPU be one CUDA graph."""

    def choose(self, batch: Batch) -> Chosen:
        """The codes of a batch."""
        raise NotImplementedError

    def stored(self, d_in: int, d_sae: int, k: int) -> LinearSAE:
        """An empty dictionary of the kind that reads rows by this rule; those of its weights that the learner has
        are copied in."""
        raise NotImplementedError

    def prefixes(self, d_sae: int) -> list[int]:
        """How many features each reconstruction of the loss reads; the last is all."""
        return [d_sae]

    @classmethod
    def knobs(cls) -> dict[str, object]:
        """{knob: its default}"""
        return {field.name: field.default for field in dataclasses.fields(cls)}
