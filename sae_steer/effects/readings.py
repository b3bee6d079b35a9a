"""What an arm does at the confirm split's onsets: every dose, both modes, and all the directions beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.edits.arms import Arm
from sae_steer.edits.edit import Control, Remembered
from sae_steer.effects.measure import (
    ELSEWHERE,
    FanRequest,
    Measure,
    OnsetRows,
    Reading,
    Request,
    read,
    unedited,
)
from sae_steer.errors import InputError
from sae_steer.model.replay import Edit
from sae_steer.pair.texts import Text
from sae_steer.randomness import Stream, random_numbers
from sae_steer.settings import InterveneSettings

JOINT_DOSES = "joint_doses"
"""Joint edits at every dose, with their control directions, on some of the texts."""
EDIT, PATCH = "edit", "full patch"
ROUND = 25
"""Directions of each family that are read jointly before it is asked whether more of them could matter."""
Columns = slice | Int[np.ndarray, " direction"]
"""Where some edits stand in a reading."""
Enough = Callable[[float, Mapping[str, Float[np.ndarray, " direction"]]], bool]
"""The mean effects of the edit and of each family's directions so far -> whether the rest need not be read."""


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
        random = random_numbers(settings.seed, Stream.ONSETS_READ)
        every = [np.flatnonzero(text.is_onset) for text in texts]
        if not sum(map(len, every)):
            raise InputError(
                f"the {len(texts)} confirm texts hold no onset, so nothing can be edited or read; cache more texts, or "
                "check the pair's [onset]"
            )
        some = [np.sort(random.permutation(positions)[: settings.onsets_per_prompt]) for positions in every]
        chosen = set(random.permutation(len(texts))[: settings.joint_control_prompts].tolist())
        few = [positions if number in chosen else positions[:0] for number, positions in enumerate(every)]
        return cls(*(OnsetRows.of(texts, positions, seed=settings.seed) for positions in (some, every, few)))

    def of_mode(self, mode: str) -> OnsetRows:
        """Those of `single`, `joint` or `joint_doses`."""
        return {"single": self.single, "joint": self.joint, JOINT_DOSES: self.joint_doses}[mode]


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
    model, layer = arm.model.model, arm.layer
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
    listed = [unedited, *few.values(), *_controls(arm.edit(primary), arm.ribbon(settings))]
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


def read_joint_controls(
    arm: Arm, onsets: Onsets, measure: Measure, settings: InterveneSettings, is_enough: Enough
) -> tuple[Reading, dict[str, Columns]]:
    """Unedited, the edit, and the directions of every family in turn, jointly on some of the texts.

    A round of each family is read at a time, until all are or `is_enough`. Beside the reading: the columns of each
    family.
    """
    parts: list[Reading] = []
    places: dict[str, list[int]] = {name: [] for name in arm.families}
    edit, width = arm.edit(settings.primary_dose), 0
    for start in range(0, settings.controls, ROUND):
        drawn = {name: units[start : start + ROUND] for name, units in arm.families.items()}
        edits = [unedited, edit, *_controls(edit, drawn)]
        request = Request(onsets.joint_doses, edits, joint=True, places=settings.positions)
        parts += read(arm.model.model, arm.layer, [request], measure)
        for name, at in families_of(drawn, after=width + 2).items():
            places[name] += range(at.start, at.stop)
        width += len(edits)
        means = np.concatenate([(part.value - part.value[:, :1]).mean(axis=0) for part in parts])
        if is_enough(float(means[1]), {name: means[at] for name, at in places.items()}):
            break
    whole = [np.concatenate(columns, axis=1) for columns in zip(*map(_columns, parts), strict=True)]
    return Reading(*whole), {name: np.array(at, dtype=int) for name, at in places.items()}


def _columns(reading: Reading) -> tuple[np.ndarray, ...]:
    return reading.value, reading.delivered, reading.kl, reading.off_target


def _controls(edit: Edit, families: Mapping[str, Float[Tensor, "_direction d_model"]]) -> list[Control]:
    """The directions of every family in turn, as far as `edit` goes."""
    remembered = Remembered(edit)
    return [Control(remembered, unit) for drawn in families.values() for unit in drawn]


def families_of(families: Mapping[str, Float[Tensor, "_direction d_model"]], *, after: int) -> dict[str, slice]:
    """Where the directions of each family stand among the columns of a joint reading, the first at `after`."""
    places, start = {}, after
    for name, drawn in families.items():
        places[name] = slice(start, start + len(drawn))
        start += len(drawn)
    return places


@dataclass(frozen=True)
class ControlRows:
    """What the control directions of one family did at the primary dose, onset by onset."""

    variant: str
    mode: str
    family: str
    dose: float
    rows: OnsetRows
    base: Float[np.ndarray, " row"]
    value: Float[np.ndarray, "row direction"]
    delivered: Float[np.ndarray, "row direction"]
    kl: Float[np.ndarray, "row direction"]
    """NaN where it was not read, as for hundreds of directions at each onset alone."""
    off_target: Float[np.ndarray, "row direction"]
    """Its change."""

    def columns(self) -> dict[str, np.ndarray]:
        """Those of `trial_rows`, direction by direction."""
        n, directions = self.value.shape
        names = [f"{self.family} {number}" for number in range(directions)]
        of_row = {"prompt": self.rows.prompt, "task": self.rows.task, "position": self.rows.position}
        of_row |= {"next_is_target": self.rows.is_target, "p_base": self.base}
        return {
            "variant": np.full(n * directions, self.variant),
            "mode": np.full(n * directions, self.mode),
            "family": np.full(n * directions, self.family),
            "direction": np.repeat(names, n),
            "dose": np.full(n * directions, self.dose),
            **{name: np.tile(column, directions) for name, column in of_row.items()},
            "p_edited": self.value.T.ravel(),
            "delivered_norm": self.delivered.T.ravel(),
            "kl": self.kl.T.ravel(),
            "off_target_nats_change": self.off_target.T.ravel(),
        }


def single_controls(of_arm: ArmReading, onsets: Onsets, settings: InterveneSettings) -> list[ControlRows]:
    """Those of every family, each onset edited alone."""
    dose, alone = settings.primary_dose, of_arm.readings["single"]
    delivered = alone.delivered[:, [of_arm.column("single", EDIT, dose)]]  # theirs is matched to it
    parts = []
    for family in of_arm.arm.families:
        value = of_arm.controls[family, dose]
        unread = np.broadcast_to(np.nan, value.shape)
        parts.append(
            ControlRows(
                of_arm.arm.variant.name, "single", family, dose, onsets.single, of_arm.base("single"),
                value, np.broadcast_to(delivered, value.shape), unread, unread,
            )
        )  # fmt: skip
    return parts


def joint_controls(
    of_arm: ArmReading, reading: Reading, places: Mapping[str, Columns], onsets: Onsets, settings: InterveneSettings
) -> list[ControlRows]:
    """Those of every family, all onsets of some texts edited together; `places` says where each stands in `reading`."""
    return [
        ControlRows(
            of_arm.arm.variant.name, "joint", family, settings.primary_dose, onsets.joint_doses, reading.value[:, 0],
            reading.value[:, at], reading.delivered[:, at], reading.kl[:, at],
            reading.off_target[:, at] - reading.off_target[:, :1],
        )
        for family, at in places.items()
    ]  # fmt: skip


def trials(readings: Sequence[ArmReading], onsets: Onsets, settings: InterveneSettings) -> dict[str, np.ndarray]:
    """One row a prompt x onset x variant x dose x direction x mode; those of control directions are `ControlRows`."""
    parts: list[dict[str, np.ndarray]] = []
    for of_arm in readings:
        variant = of_arm.arm.variant.name
        for mode, columns in of_arm.columns.items():
            rows, reading = onsets.of_mode(mode), of_arm.readings[mode]
            named = "single" if mode == "single" else "joint"
            for column, (direction, dose) in enumerate(columns, 1):
                if mode == JOINT_DOSES and (direction, dose) in of_arm.columns["joint"]:
                    continue  # read on all texts
                label = of_arm.arm.flavour if direction == EDIT else direction
                parts.append(trial_rows(rows, reading, column, variant, named, label, dose))
        parts.append(
            trial_rows(onsets.joint_doses, of_arm.elsewhere, 1, variant, "joint", ELSEWHERE, settings.primary_dose)
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def trial_rows(
    rows: OnsetRows, reading: Reading, column: int, variant: str, mode: str, direction: str, dose: float
) -> dict[str, np.ndarray]:
    """One row an onset: the edit that stands in `column` of a reading."""
    n, base, value = len(rows), reading.value[:, 0], reading.value[:, column]
    return {
        "variant": np.full(n, variant),
        "mode": np.full(n, mode),
        "family": np.full(n, ""),
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
