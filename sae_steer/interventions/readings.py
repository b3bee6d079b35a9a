"""What an arm does at the confirm split's onsets: every dose, both modes, and all the directions beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sae_steer.interventions.bench import FRESH, Arm
from sae_steer.interventions.edits import Control
from sae_steer.interventions.measure import (
    ELSEWHERE,
    FanRequest,
    Measure,
    OnsetRows,
    Reading,
    Request,
    read,
    unedited,
)
from sae_steer.pair.texts import Text
from sae_steer.settings import InterveneSettings

MODES = ("single", "joint")
EDIT, PATCH = "edit", "patch"


@dataclass(frozen=True)
class Onsets:
    """The onsets that each mode reads."""

    single: OnsetRows
    """Up to `onsets_per_prompt` of each text, drawn by seed."""
    joint: OnsetRows
    """All onsets of the same texts."""
    few: OnsetRows
    """All onsets of some of the texts, for the joint controls."""

    @classmethod
    def of(cls, texts: Sequence[Text], settings: InterveneSettings) -> "Onsets":
        """The onsets of the texts, by the settings' counts and seed."""
        random = np.random.default_rng([settings.seed, 5])
        every = [np.flatnonzero(text.is_onset) for text in texts]
        some = [np.sort(random.permutation(found)[: settings.onsets_per_prompt]) for found in every]
        chosen = set(random.permutation(len(texts))[: settings.joint_control_prompts].tolist())
        few = [found if number in chosen else found[:0] for number, found in enumerate(every)]
        return cls(*(OnsetRows.of(texts, found, seed=settings.seed) for found in (some, every, few)))

    def of_mode(self, mode: str) -> OnsetRows:
        """Those of `single` or `joint`."""
        return getattr(self, mode)


@dataclass(frozen=True)
class ArmReading:
    """One arm's readings. Column 0 is the unedited stream; `columns` names the others by (direction, dose)."""

    arm: Arm
    columns: tuple[tuple[str, float], ...]
    single: Reading
    joint: Reading
    elsewhere: Reading
    """The position control: unedited, and the edit at random positions that are no onsets, jointly."""
    controls: dict[tuple[str, float], Float[np.ndarray, "row direction"]]
    """The measure under control directions by (family, dose), each onset edited alone."""
    joint_few: Reading
    """Unedited, the edit, and `ribbon` controls of each family, jointly on some of the texts."""

    def base(self, mode: str) -> Float[np.ndarray, " row"]:
        """The unedited measure."""
        return self.reading(mode).value[:, 0]

    def reading(self, mode: str) -> Reading:
        """Of `single` or `joint`."""
        return getattr(self, mode)

    def effect(self, mode: str, direction: str, dose: float) -> Float[np.ndarray, " row"]:
        """The change of the measure by one direction at one dose."""
        return self.reading(mode).value[:, self.column(direction, dose)] - self.base(mode)

    def column(self, direction: str, dose: float) -> int:
        """Where a direction at a dose stands."""
        return 1 + self.columns.index((direction, dose))


def read_arm(arm: Arm, onsets: Onsets, measure: Measure, settings: InterveneSettings) -> ArmReading:
    """All of an arm's readings but the full families of joint controls, which only some verdicts need."""
    primary = settings.primary_dose
    edits = {(EDIT, dose): arm.edit(dose) for dose in settings.doses}
    edits |= {(flavour, primary): arm.edit(primary, flavour) for flavour in list(arm.units)[1:]}
    edits[PATCH, primary] = arm.patch
    edits |= {(name, primary): arm.positive(name, primary) for name in arm.positives}
    listed, fan = [unedited, *edits.values()], arm.fan(settings)
    single, joint, elsewhere, controls = read(
        arm.model.decoder,
        arm.layer,
        [
            Request(onsets.single, listed),
            Request(onsets.joint, listed, joint=True, places=settings.positions),
            Request(onsets.joint, [unedited, arm.edit(primary)], joint=True, places=ELSEWHERE),
            FanRequest(onsets.single, fan[0]),
        ],
        measure,
    )
    return ArmReading(
        arm,
        tuple(edits),
        single,
        joint,
        elsewhere,
        {(name, dose): controls[:, where] for name, dose, where in fan[1]},
        read_joint_controls(arm, onsets, measure, settings, count=settings.ribbon),
    )


def read_joint_controls(
    arm: Arm, onsets: Onsets, measure: Measure, settings: InterveneSettings, *, count: int
) -> Reading:
    """Unedited, the edit, and `count` directions of every family in turn, jointly on some of the texts."""
    edit = arm.edit(settings.primary_dose)
    others = [Control(edit, unit) for drawn in arm.families.values() for unit in drawn[:count]]
    request = Request(onsets.few, [unedited, edit, *others], joint=True, places=settings.positions)
    return read(arm.model.decoder, arm.layer, [request], measure)[0]


def families_of(arm: Arm, count: int, *, columns: int = 2) -> dict[str, slice]:
    """Where each family stands in what `read_joint_controls` read, after the first `columns`."""
    found, start = {}, columns
    for name, drawn in arm.families.items():
        stop = start + min(count, len(drawn))
        found[name], start = slice(start, stop), stop
    return found


def trials(readings: Sequence[ArmReading], onsets: Onsets, settings: InterveneSettings) -> dict[str, np.ndarray]:
    """One row a prompt x onset x variant x dose x direction x mode; controls stand in the record by their means."""
    parts: list[dict[str, np.ndarray]] = []
    for found in readings:
        for mode in MODES:
            rows, reading = onsets.of_mode(mode), found.reading(mode)
            for column, (direction, dose) in enumerate(found.columns, 1):
                named = found.arm.flavour if direction == EDIT else direction
                parts.append(_trial(rows, reading, column, found.arm.variant.name, mode, named, dose))
        primary = settings.primary_dose
        parts.append(_trial(onsets.joint, found.elsewhere, 1, found.arm.variant.name, "joint", ELSEWHERE, primary))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _trial(
    rows: OnsetRows, reading: Reading, column: int, variant: str, mode: str, direction: str, dose: float
) -> dict[str, np.ndarray]:
    n, base, value = len(rows), reading.value[:, 0], reading.value[:, column]
    return {
        "variant": np.full(n, variant),
        "mode": np.full(n, mode),
        "direction": np.full(n, direction),
        "dose": np.full(n, dose),
        "prompt": rows.prompt,
        "task": rows.task,
        "position": rows.position,
        "next_is_target": rows.is_target,
        "p_base": base,
        "p_edited": value,
        "delivered_norm": reading.delivered[:, column],
        "kl": reading.kl[:, column],
        "off_target_nats_change": reading.off_target[:, column] - reading.off_target[:, 0],
    }


def is_fresh(key: tuple[str, float]) -> bool:
    """Whether a set of controls is the one treated as if it were studied."""
    return key[0] == FRESH
