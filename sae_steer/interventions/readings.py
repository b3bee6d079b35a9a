"""What an arm does at the confirm split's onsets: every dose, both modes, and all the directions beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sae_steer.errors import InputError
from sae_steer.interventions.bench import Arm
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
JOINT_DOSES = "joint_doses"
"""Joint edits at every dose, with their control directions, on some of the texts."""
EDIT, PATCH = "edit", "full patch"


@dataclass(frozen=True)
class Onsets:
    """The onsets that each mode reads."""

    single: OnsetRows
    """Up to `onsets_per_prompt` of each text, drawn by seed."""
    joint: OnsetRows
    """All onsets of the same texts."""
    joint_doses: OnsetRows
    """All onsets of some of the texts."""

    @classmethod
    def of(cls, texts: Sequence[Text], settings: InterveneSettings) -> "Onsets":
        """The onsets of the texts, by the settings' counts and seed."""
        random = np.random.default_rng([settings.seed, 5])
        every = [np.flatnonzero(text.is_onset) for text in texts]
        if not sum(map(len, every)):
            raise InputError(
                f"the {len(texts)} confirm texts hold no onset, so nothing can be edited or read; cache more texts, or "
                "check the pair's [onset]"
            )
        some = [np.sort(random.permutation(found)[: settings.onsets_per_prompt]) for found in every]
        chosen = set(random.permutation(len(texts))[: settings.joint_control_prompts].tolist())
        few = [found if number in chosen else found[:0] for number, found in enumerate(every)]
        return cls(*(OnsetRows.of(texts, found, seed=settings.seed) for found in (some, every, few)))

    def of_mode(self, mode: str) -> OnsetRows:
        """Those of `single`, `joint` or `joint_doses`."""
        return getattr(self, mode)


@dataclass(frozen=True)
class ArmReading:
    """One arm's readings by mode. Column 0 is the unedited stream; `columns` names the next by (direction, dose)."""

    arm: Arm
    columns: dict[str, tuple[tuple[str, float], ...]]
    readings: dict[str, Reading]
    elsewhere: Reading
    """The position control: unedited, and the edit at random positions that are no onsets, jointly on some texts."""
    controls: dict[tuple[str, float], Float[np.ndarray, "row _direction"]]
    """The measure under control directions by (family, dose), each onset edited alone."""

    def base(self, mode: str) -> Float[np.ndarray, " row"]:
        """The unedited measure."""
        return self.readings[mode].value[:, 0]

    def effect(self, mode: str, direction: str, dose: float) -> Float[np.ndarray, " row"]:
        """The change of the measure by one direction at one dose."""
        return self.readings[mode].value[:, self.column(mode, direction, dose)] - self.base(mode)

    def column(self, mode: str, direction: str, dose: float) -> int:
        """Where a direction at a dose stands."""
        return 1 + self.columns[mode].index((direction, dose))


def read_arm(arm: Arm, onsets: Onsets, measure: Measure, settings: InterveneSettings) -> ArmReading:
    """All of an arm's readings but the full families of joint controls, which only some verdicts need."""
    primary = settings.primary_dose
    doses = {(EDIT, dose): arm.edit(dose) for dose in settings.doses}
    others = {(flavour, primary): arm.edit(primary, flavour) for flavour in list(arm.units)[1:]}
    positive = {(f"{PATCH}, {flavour}", primary): patch for flavour, patch in arm.patches.items()}
    positive |= {(name, primary): arm.positive(name, primary) for name in arm.positives}
    single, joint = doses | others | positive, {(EDIT, primary): arm.edit(primary)} | positive
    fan, places = arm.fan(settings)
    model, layer = arm.model.decoder, arm.layer
    alone, together, controls = read(
        model,
        layer,
        [
            Request(onsets.single, [unedited, *single.values()]),
            Request(onsets.joint, [unedited, *joint.values()], joint=True, places=settings.positions),
            FanRequest(onsets.single, fan),
        ],
        measure,
    )
    few = doses | others
    listed = [unedited, *few.values(), *_controls(arm, settings, settings.ribbon)]
    dosed, elsewhere = read(
        model,
        layer,
        [
            Request(onsets.joint_doses, listed, joint=True, places=settings.positions),
            Request(onsets.joint_doses, [unedited, arm.edit(primary)], joint=True, places=ELSEWHERE),
        ],
        measure,
    )
    return ArmReading(
        arm,
        {"single": tuple(single), "joint": tuple(joint), JOINT_DOSES: tuple(few)},
        {"single": alone, "joint": together, JOINT_DOSES: dosed},
        elsewhere,
        {(name, dose): controls[:, where] for name, dose, where in places},
    )


def read_joint_controls(arm: Arm, onsets: Onsets, measure: Measure, settings: InterveneSettings) -> Reading:
    """Unedited, the edit, and all directions of every family in turn, jointly on some of the texts."""
    edits = [unedited, arm.edit(settings.primary_dose), *_controls(arm, settings, settings.controls)]
    request = Request(onsets.joint_doses, edits, joint=True, places=settings.positions)
    return read(arm.model.decoder, arm.layer, [request], measure)[0]


def _controls(arm: Arm, settings: InterveneSettings, count: int) -> list[Control]:
    edit = arm.edit(settings.primary_dose)
    return [Control(edit, unit) for drawn in arm.families.values() for unit in drawn[:count]]


def families_of(arm: Arm, count: int, *, after: int) -> dict[str, slice]:
    """Where `count` directions of each family stand among the columns of a joint reading, the first at `after`."""
    found, start = {}, after
    for name, drawn in arm.families.items():
        stop = start + min(count, len(drawn))
        found[name], start = slice(start, stop), stop
    return found


def trials(readings: Sequence[ArmReading], onsets: Onsets, settings: InterveneSettings) -> dict[str, np.ndarray]:
    """One row a prompt x onset x variant x dose x direction x mode; controls stand in the record by their means."""
    parts: list[dict[str, np.ndarray]] = []
    for found in readings:
        variant = found.arm.variant.name
        for mode, columns in found.columns.items():
            rows, reading, named = onsets.of_mode(mode), found.readings[mode], mode.split("_")[0]
            for column, (direction, dose) in enumerate(columns, 1):
                if mode == JOINT_DOSES and (direction, dose) in found.columns["joint"]:
                    continue  # read on all texts
                label = found.arm.flavour if direction == EDIT else direction
                parts.append(_trial(rows, reading, column, variant, named, label, dose))
        parts.append(_trial(onsets.joint_doses, found.elsewhere, 1, variant, "joint", ELSEWHERE, settings.primary_dose))
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
