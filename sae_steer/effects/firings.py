"""How often a feature fires at the onsets that are read, and whether that is often enough to test it."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.edits.variants import Direction
from sae_steer.effects.measure import OnsetRows
from sae_steer.effects.readings import Onsets
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.replay import gather
from sae_steer.settings import InterveneSettings


def count_firings(
    model: LanguageModel, layer: int, direction: Direction, onsets: Onsets, settings: InterveneSettings
) -> dict:
    """Onsets and tasks at which a feature fires in the target model, also among those edited one at a time."""
    fires = {mode: _fires(model, layer, direction, onsets.of_mode(mode)) for mode in ("single", "joint")}
    return {
        "onsets": int(fires["joint"].sum()),
        "of_onsets": len(onsets.joint),
        "tasks": len(np.unique(onsets.joint.task[fires["joint"]])),
        "single_onsets": int(fires["single"].sum()),
        "of_single_onsets": len(onsets.single),
        "needs_onsets": settings.min_firings,
        "needs_tasks": settings.min_tasks,
    }


def why_untested(firings: dict, name: str) -> str | None:
    """What a feature lacks for a test, with the counts; None if it can be tested."""
    enough = firings["onsets"] >= firings["needs_onsets"] and firings["tasks"] >= firings["needs_tasks"]
    if enough and firings["single_onsets"]:
        return None
    none_alone = "" if firings["single_onsets"] else ", at none of those drawn to be edited singly"
    return (
        f"{name} fires at {firings['onsets']} onsets of {firings['tasks']} tasks in the confirm texts{none_alone}; a "
        f"test needs {firings['needs_onsets']} onsets of {firings['needs_tasks']} tasks"
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
