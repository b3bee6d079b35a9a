"""Every effect of a study against its bound: the gap between the models, the contrasts, the corrected p."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from sae_steer import stats
from sae_steer.effects.estimates import Effect, estimates
from sae_steer.effects.readings import EDIT, JOINT_DOSES, ArmReading, Onsets
from sae_steer.effects.units import UNCAPPED, Unit, cap_of, unit_of
from sae_steer.model.readout import Measure
from sae_steer.settings import MODES, Bound, InterveneSettings
from sae_steer.stats import AgainstBound
from sae_steer.study.record import BoundResult


@dataclass(frozen=True)
class Comparison:
    """The readings of all arms at the same onsets, and what is compared with what."""

    readings: tuple[ArmReading, ...]
    onsets: Onsets
    measure: Measure
    settings: InterveneSettings

    @property
    def unit(self) -> Unit:
        """What effects are told in."""
        return unit_of(self.measure)

    @property
    def bound(self) -> Bound:
        """What effects are compared with, in the measure's unit."""
        return Bound(self.settings.bound_share, cap_of(self.measure, self.settings))

    @cached_property
    def gap(self) -> dict[str, Float[np.ndarray, " _row"]]:
        """The measure in the target model minus that in the reference, at the same onsets."""
        target = next(r for r in self.readings if r.arm.variant.edits_target)
        reference = next(r for r in self.readings if not r.arm.variant.edits_target)
        return {mode: target.base(mode) - reference.base(mode) for mode in (*MODES, JOINT_DOSES)}

    def against(self, effect: Float[np.ndarray, " row"], mode: str, *, times: float = 1.0) -> AgainstBound:
        """An effect against `times` the bound."""
        return stats.against_bound(
            effect[:, None],
            self.gap[mode][:, None],
            self.onsets.of_mode(mode).task,
            share=times * self.bound.share,
            cap=times * self.bound.cap,
            **vars(self.settings.resampling),
        )

    @cached_property
    def compared(self) -> dict[tuple[str, str], AgainstBound]:
        """{(variant, mode): the edit at the primary dose against the bound}."""
        dose = self.settings.primary_dose
        return {
            (r.arm.variant.name, mode): self.against(r.effect(mode, EDIT, dose), mode)
            for r in self.readings
            for mode in MODES
        }

    @cached_property
    def corrected(self) -> dict[tuple[str, str], tuple[float, float]]:
        """{(variant, mode): p above, p below}, Holm-corrected over all of them.

        No effect is near both ends of the bound, so the smaller p of the two sides is one test, not two.
        """
        sides = np.array([[c.p_above[0], c.p_below[0]] for c in self.compared.values()])
        adjusted = stats.holm(sides.min(axis=1))
        pairs = {}
        for key, (above, below), p in zip(self.compared, sides, adjusted, strict=True):
            pairs[key] = (float(p), 1.0) if above <= below else (1.0, float(p))
        return pairs

    def sample_size(self, reading: ArmReading, mode: str) -> stats.SampleSize:
        """What it would take to place this effect inside the bound."""
        effect = reading.effect(mode, EDIT, self.settings.primary_dose)
        value = float(self.compared[reading.arm.variant.name, mode].bound[0])
        share_is_smaller = self.bound.share * np.abs(self.gap[mode].mean()) <= self.bound.cap
        contrast = effect - self.bound.share * self.gap[mode] if share_is_smaller else effect
        return stats.sample_size(contrast, self.onsets.of_mode(mode).task, max(value, 1e-12))

    def gap_effect(self, mode: str) -> Effect:
        """The gap with its interval."""
        return estimates(self.gap[mode][:, None], self.onsets.of_mode(mode), self.settings.resampling)[0]

    def bound_result(self) -> BoundResult:
        """The bound as fixed, and as it comes out at the estimated gap."""
        first = next(iter(self.compared.values()))
        cap = None if self.bound.cap == UNCAPPED else self.bound.cap
        return BoundResult(self.bound.share, cap, float(first.bound[0]))
