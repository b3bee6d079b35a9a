"""How often a feature fires at the onsets that are read, and whether that is often enough to test it."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.edits.variants import Direction
from sae_steer.effects.measure import OnsetRows
from sae_steer.effects.readings import Onsets
from sae_steer.effects.splicing import SplicedLoss
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.replay import gather


@dataclass(frozen=True, kw_only=True)
class FiringCount:
    """Onsets and tasks at which a feature fires, and how many of both a test needs."""

    onsets: int
    of_onsets: int
    tasks: int
    single_onsets: int
    """Of the onsets that are edited one at a time, those at which it fires."""
    of_single_onsets: int
    needs_onsets: int
    needs_tasks: int

    @property
    def enough(self) -> bool:
        """Whether the feature fires often enough to be tested."""
        return self.onsets >= self.needs_onsets and self.tasks >= self.needs_tasks

    def why_untested(self, name: str) -> str | None:
        """What the feature lacks for a test, with the counts; None if it can be tested."""
        if self.enough and self.single_onsets:
            return None
        none_alone = "" if self.single_onsets else ", at none of those drawn to be edited singly"
        return (
            f"{name} fires at {self.onsets} onsets of {self.tasks} tasks in the confirm texts{none_alone}; a test "
            f"needs {self.needs_onsets} onsets of {self.needs_tasks} tasks"
        )


@dataclass(frozen=True, kw_only=True)
class Firings(FiringCount):
    """The count in the target model, and what else a record says of a feature."""

    s: float | None
    """The length of dose 1; None for a feature that is silent on the tune texts."""
    s_from: str
    s_share_of_resid_norm: float | None
    """`s` as a share of the stream's median length there."""
    reference_onsets: int | None = None
    """Onsets at which the feature fires in the reference; None where the widths differ."""
    ce_recovered: SplicedLoss | None = None
    """None where the feature is not tested."""


def count_firings(
    model: LanguageModel, layer: int, direction: Direction, onsets: Onsets, *, needs_onsets: int, needs_tasks: int
) -> FiringCount:
    """Onsets and tasks at which a feature fires in a model, also among those edited one at a time."""
    single = _fires(model, layer, direction, onsets.single)
    joint = _fires(model, layer, direction, onsets.joint)
    return FiringCount(
        onsets=int(joint.sum()),
        of_onsets=len(joint),
        tasks=len(np.unique(onsets.joint.task[joint])),
        single_onsets=int(single.sum()),
        of_single_onsets=len(single),
        needs_onsets=needs_onsets,
        needs_tasks=needs_tasks,
    )


def _fires(model: LanguageModel, layer: int, direction: Direction, rows: OnsetRows) -> np.ndarray:
    assert direction.sae is not None
    assert direction.feature is not None
    return (direction.sae.activation_of(onset_stream(model, layer, rows), direction.feature) != 0).cpu().numpy()


@torch.no_grad()
def onset_stream(model: LanguageModel, layer: int, rows: OnsetRows) -> Float[Tensor, "row d_model"]:
    """The stream after block `layer` at the onsets, unedited."""
    parts = []
    for batch in rows.batches:
        resid = model.resid_posts(batch.tokens.to(model.device), (layer,))[layer]
        parts.append(gather(resid, batch.positions.to(model.device))[batch.real.to(model.device)])
    return torch.cat(parts)
