"""Ablating a feature together with those most like it: does the dictionary spread one cause over several features?

The group is the feature and others of its dictionary that fire where it fires (at a tenth or more of its onsets on
the tune texts) and point its way: decoder cosine of .3 or more, the sixteen nearest at most; the four nearest where
fewer are that near. Descriptive: beside the verdicts, never among them.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from sae_steer.edits.controls import MAX_COSINE, decoder_rows
from sae_steer.edits.edit import AblateGroup, ZeroAblate
from sae_steer.edits.variants import Direction
from sae_steer.effects.estimates import Effect, estimates
from sae_steer.effects.measure import Request, read, unedited
from sae_steer.effects.readings import Onsets, trial_rows
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.readout import Measure
from sae_steer.settings import MODES, InterveneSettings

LEAST, MOST = 4, 16
"""Features beside the one studied."""
COFIRING = 0.1
"""Least share of the feature's onsets at which another must fire too."""
GROUP = "group_ablate"


@dataclass(frozen=True)
class Likeness:
    """A feature of the group, and how like the one studied it is."""

    feature: int
    cosine: float
    """Of the decoder rows."""
    cofiring: float
    """Share of the studied feature's onsets at which it fires too."""


@dataclass(frozen=True, kw_only=True)
class GroupEffect(Effect):
    """What ablating the group did, beside the feature alone."""

    rows_edited: int
    alone: Effect


@dataclass(frozen=True)
class Group:
    """The features most like the one studied, and what ablating all of them does."""

    features: tuple[Likeness, ...]
    """Beside the one studied."""
    single: GroupEffect
    joint: GroupEffect


def features_like(
    direction: Direction, rows: Float[Tensor, "row d_model"], is_onset: Bool[np.ndarray, " row"]
) -> tuple[Likeness, ...]:
    """The features most like the direction's own, nearest first.

    Args:
        rows: the target's stream over the tune texts.
    """
    sae, feature = direction.sae, direction.feature
    assert sae is not None, "only a feature of a dictionary has others like it"
    assert feature is not None, "only a feature of a dictionary has others like it"
    codes = sae.encode(rows[np.flatnonzero(is_onset)])
    fires = codes.of_feature(feature) != 0
    together = np.bincount(
        codes.indices[fires[codes.rows] & (codes.values != 0)].cpu(), minlength=sae.config.d_sae
    ) / max(int(fires.sum()), 1)
    decoder = decoder_rows(sae).double()
    cosine = (
        (decoder @ decoder[feature] / (decoder.norm(dim=1) * decoder[feature].norm()).clamp_min(1e-12)).cpu().numpy()
    )
    eligible = np.flatnonzero(together >= COFIRING)
    eligible = eligible[eligible != feature]
    nearest = eligible[np.argsort(-cosine[eligible], kind="stable")]
    count = np.clip(int((cosine[nearest] >= MAX_COSINE).sum()), LEAST, MOST)
    return tuple(Likeness(int(f), float(cosine[f]), float(together[f])) for f in nearest[:count])


def read_group(
    model: LanguageModel,
    layer: int,
    direction: Direction,
    like: tuple[Likeness, ...],
    onsets: Onsets,
    measure: Measure,
    settings: InterveneSettings,
) -> tuple[Group, dict[str, np.ndarray]]:
    """What ablating the group does, single and joint, beside the feature alone; and its trials."""
    sae, feature, dose = direction.sae, direction.feature, settings.primary_dose
    assert sae is not None, "only a feature of a dictionary can be ablated"
    assert feature is not None, "only a feature of a dictionary can be ablated"
    group = AblateGroup(sae, (feature, *(one.feature for one in like)), dose)
    edits = [unedited, group, ZeroAblate(sae, feature, dose)]
    requests = [
        Request(onsets.of_mode(mode), edits, joint=mode == "joint", places=settings.positions) for mode in MODES
    ]
    effects: dict[str, GroupEffect] = {}
    parts = []
    for mode, reading in zip(MODES, read(model, layer, requests, measure), strict=True):
        rows = onsets.of_mode(mode)
        together, alone = estimates(reading.value[:, 1:] - reading.value[:, :1], rows, settings.resampling)
        moved = int((reading.delivered[:, 1] > 0).sum())
        effects[mode] = GroupEffect(**vars(together), rows_edited=moved, alone=alone)
        parts.append(trial_rows(rows, reading, 1, GROUP, mode, GROUP, dose))
    return Group(like, **effects), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
