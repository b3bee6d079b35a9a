"""The gates of one arm, from its readings: which of them hold, and what was seen (`gates` says what each is)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae_steer import stats
from sae_steer.edits.arms import FRESH
from sae_steer.effects.estimates import ControlFamily
from sae_steer.effects.measure import OnsetRows
from sae_steer.effects.readings import EDIT, JOINT_DOSES, PATCH, ArmReading
from sae_steer.pair.texts import Text
from sae_steer.settings import LEVEL, MODES
from sae_steer.study import gates
from sae_steer.study.comparison import Comparison
from sae_steer.study.gates import Gate

GATE_TEXTS = 4
"""Texts on which replay is checked against full passes."""


@dataclass(frozen=True)
class ArmGates:
    """An arm's readings, and what its gates are checked on."""

    comparison: Comparison
    texts: Sequence[Text]
    reading: ArmReading
    families: Sequence[ControlFamily]
    """Beside the edit made at each onset alone."""

    def checked(self) -> tuple[Gate, ...]:
        """All of them, in their order."""
        arm, settings = self.reading.arm, self.comparison.settings
        same = all(
            np.array_equal(self.reading.effect(mode, EDIT, 0.0), np.zeros(len(self.reading.base(mode))))
            for mode in ("single", JOINT_DOSES)
        )
        delivered_and_replayed = gates.check_replay(
            arm, self._gate_rows(), self.comparison.measure, settings.primary_dose, settings.positions
        )
        return (
            gates.dose_zero(same),
            *delivered_and_replayed,
            gates.basis_gate(arm),
            self._patch_gate(),
            self._size_gate(),
            self._calibration_gate(),
        )

    def _gate_rows(self) -> OnsetRows:
        """The single onsets of a few texts, those with the most edited rows first."""
        column = self.reading.column("single", EDIT, self.comparison.settings.primary_dose)
        moved = self.reading.readings["single"].delivered[:, column] > 0
        prompts, where = np.unique(self.comparison.onsets.single.prompt, return_inverse=True)
        chosen = prompts[np.argsort(-np.bincount(where, moved), kind="stable")[:GATE_TEXTS]]
        texts = [text for text in self.texts if text.prompt in chosen]
        rows = self.comparison.onsets.single
        return OnsetRows.of(texts, [np.sort(rows.position[rows.prompt == text.prompt]) for text in texts])

    def _patch_gate(self) -> Gate:
        """Gate 6a: a map fitted on what the edited model makes of the same texts may leave out what it lacks, so
        the other stream is patched in raw too, where the widths allow.
        """
        names = [f"{PATCH}, {flavour}" for flavour in self.reading.arm.patches]
        towards_donor = -1 if self.reading.arm.variant.edits_target else +1
        beyond, said = self._any_beyond(names, towards_donor, times=1.0)
        return gates.patch_gate(beyond, f"{said}; map's held-out R2 {self.reading.arm.patch_r2:.3f}")

    def _size_gate(self) -> Gate:
        names, sign = list(self.reading.arm.positives), self.reading.arm.variant.predicted_sign
        beyond, said = self._any_beyond(names, sign, times=2.0)
        return gates.size_gate(beyond, said or "no positive control can be made for this measure")

    def _any_beyond(self, names: Sequence[str], sign: int, *, times: float) -> tuple[bool, str]:
        results = {name: self._beyond(name, sign, times=times) for name in names}
        held = any(beyond for beyond, _ in results.values())
        return held, "; ".join(f"{name} {said}" for name, (_, said) in results.items())

    def _beyond(self, direction: str, sign: int, *, times: float) -> tuple[bool, str]:
        """Whether a direction goes beyond `times` the bound on the side of `sign`, in either mode, and what it did."""
        held = []
        said = []
        for mode in MODES:
            effect = self.reading.effect(mode, direction, self.comparison.settings.primary_dose)
            held.append(bool(self.comparison.against(effect, mode, times=times).beyond(sign, LEVEL)[0]))
            said.append(f"{self.comparison.unit.signed(effect.mean())} ({mode})")
        return any(held), f"{', '.join(said)} {self.comparison.unit.name}"

    def _calibration_gate(self) -> Gate:
        """Gate 7: fresh directions through the same two tests, in the single mode."""
        fresh = self.reading.controls[FRESH, self.comparison.settings.primary_dose]
        effects = fresh - self.reading.base("single")[:, None]
        sign = self.reading.arm.variant.predicted_sign
        nulls = [np.array(family.means) for family in self.families if family.ranked]
        causal = 0
        for effect in effects.T:
            mean = float(effect.mean())
            if nulls and all(stats.rank_p(mean, null) <= LEVEL for null in nulls):
                causal += bool(self.comparison.against(effect, "single").beyond(sign, LEVEL)[0])
        return gates.calibration_gate(causal, fresh.shape[1], self.reading.arm.fresh_family)
