"""The protocol on objects in memory: two models, a direction, onsets of confirm texts, a measure; out comes a verdict.

1. Read every arm at every dose, each onset alone and all of a text together, with its control directions.
2. Compare the effects at the primary dose with the bound, Holm-corrected over variants and modes; where a joint
   effect alone lies beyond it, read the full families of joint controls too.
3. Check the gates; judge each variant, then the study.

`evidence` is one caller's work: `study.py` reads a pair and a cache, and adds sampled plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sae_steer import stats
from sae_steer.interventions import gates
from sae_steer.interventions.bench import FRESH, Arm
from sae_steer.interventions.effects import Table, describe_controls, rank
from sae_steer.interventions.gates import Gate
from sae_steer.interventions.measure import Measure, OnsetRows
from sae_steer.interventions.readings import (
    EDIT,
    MODES,
    PATCH,
    ArmReading,
    Onsets,
    families_of,
    read_arm,
    read_joint_controls,
    trials,
)
from sae_steer.interventions.verdict import ModeTests, Verdict, judge, judge_study, listed
from sae_steer.pair.texts import Text
from sae_steer.runtime import Progress, silent
from sae_steer.settings import InterveneSettings
from sae_steer.stats import AgainstBound

GATE_TEXTS = 4
"""Texts on which replay is checked against full passes."""


@dataclass(frozen=True)
class Evidence:
    """Everything the protocol found about one direction."""

    verdict: str
    verdicts: dict[str, Verdict]
    gates: tuple[Gate, ...]
    """Of the study."""
    record: dict
    """The part of a study's record that the readings fill."""
    trials: dict[str, np.ndarray]


def weigh(
    arms: Sequence[Arm],
    texts: Sequence[Text],
    measure: Measure,
    settings: InterveneSettings,
    *,
    study_gates: Sequence[Gate] = (),
    on_step: Progress = silent,
) -> Evidence:
    """The evidence on one direction, from its arms and the confirm texts.

    Args:
        study_gates: gates that hold of all arms alike and were checked before, such as the dictionary's.
    """
    onsets = Onsets.of(texts, settings)
    for mode in MODES:
        stats.check_clusters(onsets.of_mode(mode).task)
    readings = []
    for done, arm in enumerate(arms):
        on_step(done, len(arms) + 1, f"{arm.variant.name}: exact effects")
        readings.append(read_arm(arm, onsets, measure, settings))
    on_step(len(arms), len(arms) + 1, "tests and gates")
    weighing = Weighing(tuple(readings), onsets, measure, settings, tuple(study_gates))
    verdicts = weighing.verdicts()
    name = judge_study({variant: verdict for variant, verdict in verdicts.items()})
    record = {
        "primary_dose": settings.primary_dose,
        "gap": weighing.gap_record(),
        "baseline": {mode: {r.arm.variant.name: float(r.base(mode).mean()) for r in readings} for mode in MODES},
        "bound": weighing.bound_record(),
        "verdict": name,
        "verdicts_listed": listed(verdicts),
        "quick": settings.quick,
        "gates": [weighing.gate_record(gate) for gate in weighing.study_gates()],
        "variants": [weighing.variant_record(reading, verdicts[reading.arm.variant.name]) for reading in readings],
    }
    on_step(len(arms) + 1, len(arms) + 1, "judged")
    return Evidence(name, verdicts, tuple(weighing.study_gates()), record, trials(readings, onsets, settings))
