"""The protocol on objects in memory: the arms of a direction, confirm texts, a measure; out comes a verdict.

1. Read every arm at every dose, each onset alone and all of a text together, with its control directions.
2. Compare the effects at the primary dose with the bound, Holm-corrected over variants and modes. Where a joint
   effect lies beyond it and the single one does not decide, read the full families of joint controls too, until
   one of them rules a special effect out.
3. Check the gates; judge each variant, then the study.

`study.py` is one caller: it reads a pair and a cache, writes a plan first, and adds sampled plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float

from sae_steer import stats
from sae_steer.edits.arms import FRESH, Arm
from sae_steer.effects import estimates as effects
from sae_steer.effects.measure import OnsetRows
from sae_steer.effects.readings import (
    EDIT,
    JOINT_DOSES,
    PATCH,
    ArmReading,
    ControlRows,
    Onsets,
    families_of,
    joint_controls,
    read_arm,
    read_joint_controls,
    single_controls,
    trials,
)
from sae_steer.effects.units import UNCAPPED, cap_of, is_probability, unit_of
from sae_steer.errors import InputError
from sae_steer.model.readout import Measure
from sae_steer.pair.texts import Text
from sae_steer.progress import Progress, silent
from sae_steer.settings import LEVEL, MODES, InterveneSettings
from sae_steer.stats import AgainstBound
from sae_steer.study import gates
from sae_steer.study.gates import Gate
from sae_steer.study.verdict import ModeTests, Verdict, judge, judge_study, listed

GATE_TEXTS = 4
"""Texts on which replay is checked against full passes."""


@dataclass(frozen=True)
class Evidence:
    """Everything the protocol found about one direction."""

    verdict: str
    verdicts: dict[str, Verdict]
    """By variant."""
    record: dict
    """The part of a study's record that the readings fill."""
    trials: dict[str, np.ndarray]
    controls: tuple[ControlRows, ...]
    """The trials of the control directions."""


def weigh(
    arms: Sequence[Arm],
    texts: Sequence[Text],
    measure: Measure,
    settings: InterveneSettings,
    *,
    known_gates: Sequence[Gate] = (),
    on_step: Progress = silent,
) -> Evidence:
    """The evidence on one direction, from its arms and the confirm texts.

    Args:
        known_gates: gates that hold of all arms alike and were checked before, such as the dictionary's.
    """
    check_settings(settings)
    onsets = Onsets.of(texts, settings)
    stats.check_clusters(onsets.single.task)
    readings = []
    for done, arm in enumerate(arms):
        on_step(done, len(arms), f"{arm.variant.name}: exact effects")
        readings.append(read_arm(arm, onsets, measure, settings))
    weighing = Weighing(tuple(readings), texts, onsets, measure, settings)
    common = [*known_gates, weighing.gap_gate()]
    judged = {r.arm.variant.name: weighing.judge(r, common) for r in readings}
    verdicts = {name: verdict for name, (verdict, _) in judged.items()}
    record = {
        "verdict": judge_study(verdicts),
        "verdicts": listed(verdicts),
        "quick": settings.quick,
        "primary_dose": settings.primary_dose,
        "bound": weighing.bound_record(),
        "gap": {mode: weighing.gap_record(mode) for mode in MODES},
        "baseline": {mode: {r.arm.variant.name: float(r.base(mode).mean()) for r in readings} for mode in MODES},
        "gates": [gate_record(gate) for gate in common],
        "variants": [record for _, record in judged.values()],
    }
    on_step(len(arms), len(arms), "judged")
    controls = [part for found in readings for part in single_controls(found, onsets, settings)]
    controls += [part for name in verdicts for part in weighing.joint_controls[name]]
    return Evidence(record["verdict"], verdicts, record, trials(readings, onsets, settings), tuple(controls))


def check_settings(settings: InterveneSettings) -> None:
    """Raise the `InputError` of settings under which a gate or a test would have nothing to read."""
    if settings.primary_dose not in settings.doses:
        raise InputError(f"the primary dose {settings.primary_dose} is not among the doses {settings.doses}; add it")
    if 0.0 not in settings.doses:
        raise InputError(f"dose 0, at which gate 1 reads, is not among the doses {settings.doses}; add it")
    if settings.controls < 1 or settings.calibration < 1:
        raise InputError(
            f"{settings.controls} control and {settings.calibration} fresh directions leave nothing to compare an edit "
            f"with; set controls to {effects.FEWEST_RANKED} or more, and calibration to 1 or more"
        )


@dataclass(frozen=True)
class Weighing:
    """All readings of a study, and the tests they are put to."""

    readings: tuple[ArmReading, ...]
    texts: Sequence[Text]
    onsets: Onsets
    measure: Measure
    settings: InterveneSettings
    joint_controls: dict[str, list[ControlRows]] = field(default_factory=dict)
    """By variant; filled as they are judged."""

    @property
    def cap(self) -> float:
        """The largest bound, in the measure's unit."""
        return cap_of(self.measure, self.settings)

    @cached_property
    def gap(self) -> dict[str, Float[np.ndarray, " _row"]]:
        """The measure in the target model minus that in the reference, at the same onsets."""
        target = next(r for r in self.readings if r.arm.variant.edits_target)
        reference = next(r for r in self.readings if not r.arm.variant.edits_target)
        return {mode: target.base(mode) - reference.base(mode) for mode in (*MODES, JOINT_DOSES)}

    def against(self, effect: Float[np.ndarray, " row"], mode: str, *, times: float = 1.0) -> AgainstBound:
        """An effect against `times` the bound."""
        settings = self.settings
        return stats.against_bound(
            effect[:, None],
            self.gap[mode][:, None],
            self.onsets.of_mode(mode).task,
            share=times * settings.bound_share,
            cap=times * self.cap,
            draws=settings.bootstrap_draws,
            seed=settings.seed,
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
        found = {}
        for key, (above, below), p in zip(self.compared, sides, adjusted, strict=True):
            found[key] = (float(p), 1.0) if above <= below else (1.0, float(p))
        return found

    def judge(self, found: ArmReading, common: Sequence[Gate]) -> tuple[Verdict, dict]:
        """A variant's verdict and its part of the record."""
        arm, settings = found.arm, self.settings
        name, dose = arm.variant.name, settings.primary_dose
        single = effects.control_records(
            float(found.effect("single", EDIT, dose).mean()), self._control_means(found), settings
        )
        joint = self._joint_controls(found, single)
        ranks = {"single": effects.worst_rank(single), "joint": effects.worst_rank(joint["families"])}
        tests = {
            mode: ModeTests(
                *self.corrected[name, mode],
                inside=bool(self.compared[name, mode].inside(LEVEL)[0]),
                specific_p=ranks[mode],
                inside_but_few=self._is_inside_but_few(self.compared[name, mode]),
            )
            for mode in MODES
        }
        checked = [*self._arm_gates(found, single)]
        needs = {mode: self._sample_size(found, mode) for mode in MODES}
        most = max(needs.values(), key=lambda size: size.onsets)
        sentence = f"about {most.onsets:,} onsets of {most.clusters:,} tasks would decide"
        verdict = judge(arm.variant.predicted_sign, tests, [*common, *checked], needs=sentence)
        record = {
            "variant": name,
            "model": arm.model.name,
            "site": f"blocks.{arm.layer}.hook_resid_post",
            "predicted_sign": arm.variant.predicted_sign,
            "direction": arm.flavour,
            "verdict": verdict.name,
            "why": verdict.why,
            "gates": [gate_record(gate) for gate in checked],
            **{
                mode: {
                    **self._mode_record(found, mode),
                    "tests": self._test_record(found, mode, tests[mode], needs[mode]),
                }
                for mode in MODES
            },
            "joint_doses": self._mode_record(found, JOINT_DOSES),
            "elsewhere": effects.estimates(
                found.elsewhere.value[:, 1:] - found.elsewhere.value[:, :1], self.onsets.joint_doses, settings
            )[0],
            "controls": single,
            "joint_controls": joint,
            "by_task": effects.task_means(found.effect("single", EDIT, dose), self.onsets.single),
        }
        return verdict, record

    def _mode_record(self, found: ArmReading, mode: str) -> dict:
        probability = is_probability(self.measure)
        onsets, gap = self.onsets.of_mode(mode), self.gap[mode]
        return effects.mode_record(found, mode, onsets, gap, self.settings, probability=probability)

    @staticmethod
    def _is_inside_but_few(compared: AgainstBound) -> bool:
        return bool(compared.p_inside[0] < LEVEL and compared.clusters < stats.MIN_CLUSTERS_FOR_NULL)

    def _control_means(self, found: ArmReading) -> dict[tuple[str, float], Float[np.ndarray, " _direction"]]:
        base = found.base("single")[:, None]
        return {key: (value - base).mean(axis=0) for key, value in found.controls.items()}

    def _joint_controls(self, found: ArmReading, single: Sequence[dict]) -> dict:
        """Joint controls: a few of each family, or all of them where the verdict turns on the joint effect."""
        name, arm, settings = found.arm.variant.name, found.arm, self.settings
        rank = effects.worst_rank(single)
        decided = min(self.corrected[name, "single"]) <= LEVEL and rank is not None and rank <= LEVEL
        turns_on_joint = min(self.corrected[name, "joint"]) <= LEVEL and not decided
        families = arm.families if turns_on_joint else arm.ribbon(settings)
        planned = {name: len(drawn) for name, drawn in families.items()}
        if turns_on_joint:
            is_enough = partial(effects.is_outranked, planned=planned, settings=settings)
            reading, places = read_joint_controls(arm, self.onsets, self.measure, settings, is_enough)
            edit = 1
        else:
            reading = found.readings[JOINT_DOSES]
            places = families_of(families, after=1 + len(found.columns[JOINT_DOSES]))
            edit = found.column(JOINT_DOSES, EDIT, settings.primary_dose)
        means = (reading.value - reading.value[:, :1]).mean(axis=0)
        self.joint_controls[name] = joint_controls(found, reading, places, self.onsets, settings)
        by_family = {(family, settings.primary_dose): means[at] for family, at in places.items()}
        return {
            "n": len(self.onsets.joint_doses),
            "tasks": self.onsets.joint_doses.tasks,
            "edit_mean": float(means[edit]),
            "families": effects.control_records(float(means[edit]), by_family, settings, planned),
        }

    def gap_gate(self) -> Gate:
        """Gate 8."""
        gap = self.gap_record("single")
        return gates.gap_gate(gap["mean"], gap["low"], gap["high"], unit_of(self.measure))

    def _arm_gates(self, found: ArmReading, single: Sequence[dict]) -> list[Gate]:
        arm, settings = found.arm, self.settings
        same = all(
            np.array_equal(found.effect(mode, EDIT, 0.0), np.zeros(len(found.base(mode))))
            for mode in ("single", JOINT_DOSES)
        )
        checked = gates.check_replay(
            arm, self._gate_rows(found), self.measure, settings.primary_dose, settings.positions
        )
        return [
            gates.dose_zero(same),
            *checked,
            gates.basis_gate(arm),
            self._patch_gate(found),
            self._size_gate(found),
            self._calibration_gate(found, single),
        ]

    def _gate_rows(self, found: ArmReading) -> OnsetRows:
        """The single onsets of a few texts, those with the most edited rows first."""
        column = found.column("single", EDIT, self.settings.primary_dose)
        moved = found.readings["single"].delivered[:, column] > 0
        prompts, where = np.unique(self.onsets.single.prompt, return_inverse=True)
        chosen = prompts[np.argsort(-np.bincount(where, moved), kind="stable")[:GATE_TEXTS]]
        texts = [text for text in self.texts if text.prompt in chosen]
        rows = self.onsets.single
        return OnsetRows.of(texts, [np.sort(rows.position[rows.prompt == text.prompt]) for text in texts])

    def _patch_gate(self, found: ArmReading) -> Gate:
        """Gate 6a: a map fitted on what the edited model makes of the same texts may leave out what it lacks, so
        the other stream is patched in raw too, where the widths allow.
        """
        names = [f"{PATCH}, {flavour}" for flavour in found.arm.patches]
        beyond, said = self._any_beyond(found, names, times=1.0)
        return gates.patch_gate(beyond, f"{said}; map's held-out R2 {found.arm.patch_r2:.3f}")

    def _size_gate(self, found: ArmReading) -> Gate:
        beyond, said = self._any_beyond(found, list(found.arm.positives), times=2.0)
        return gates.size_gate(beyond, said or "no positive control can be made for this measure")

    def _any_beyond(self, found: ArmReading, names: Sequence[str], *, times: float) -> tuple[bool, str]:
        results = {name: self._beyond(found, name, times=times) for name in names}
        return any(held for held, _ in results.values()), "; ".join(
            f"{name} {said}" for name, (_, said) in results.items()
        )

    def _beyond(self, found: ArmReading, direction: str, *, times: float) -> tuple[bool, str]:
        """Whether a direction goes beyond `times` the bound as predicted, in either mode, and what it did."""
        sign, dose, held, said = found.arm.variant.predicted_sign, self.settings.primary_dose, [], []
        unit = unit_of(self.measure)
        for mode in MODES:
            effect = found.effect(mode, direction, dose)
            held.append(bool(self.against(effect, mode, times=times).beyond(sign, LEVEL)[0]))
            said.append(f"{unit.signed(effect.mean())} ({mode})")
        return any(held), f"{', '.join(said)} {unit.name}"

    def _calibration_gate(self, found: ArmReading, single: Sequence[dict]) -> Gate:
        """Gate 7: fresh directions through the same two tests, in the single mode."""
        fresh = found.controls[FRESH, self.settings.primary_dose] - found.base("single")[:, None]
        sign = found.arm.variant.predicted_sign
        ranked = [np.array(record["means"]) for record in single if record["ranked"]]
        causal = 0
        for effect in fresh.T:
            mean = float(effect.mean())
            if ranked and all(stats.rank_p(mean, null) <= LEVEL for null in ranked):
                causal += bool(self.against(effect, "single").beyond(sign, LEVEL)[0])
        return gates.calibration_gate(causal, fresh.shape[1], found.arm.fresh_family)

    def _sample_size(self, found: ArmReading, mode: str) -> stats.SampleSize:
        """What it would take to place this effect inside the bound."""
        effect, compared = (
            found.effect(mode, EDIT, self.settings.primary_dose),
            self.compared[found.arm.variant.name, mode],
        )
        bound = float(compared.bound[0])
        share = self.settings.bound_share * np.abs(self.gap[mode].mean()) <= self.cap
        contrast = effect - self.settings.bound_share * self.gap[mode] if share else effect
        return stats.sample_size(contrast, self.onsets.of_mode(mode).task, max(bound, 1e-12))

    def _test_record(self, found: ArmReading, mode: str, tests: ModeTests, needs: stats.SampleSize) -> dict:
        compared, settings = self.compared[found.arm.variant.name, mode], self.settings
        effect, task = found.effect(mode, EDIT, settings.primary_dose), self.onsets.of_mode(mode).task
        se, clusters, bound = float(compared.effect.se[0]), compared.clusters, float(compared.bound[0])
        flips = stats.sign_flip_p(effect[:, None], task, draws=settings.bootstrap_draws, seed=settings.seed)
        return {
            "low_90": float(compared.effect.low[0]),
            "high_90": float(compared.effect.high[0]),
            "p_above_holm": tests.p_above,
            "p_below_holm": tests.p_below,
            "p_inside": float(compared.p_inside[0]),
            "inside": tests.inside,
            "specific_p": tests.specific_p,
            "detectable_p": float(flips[0]),
            "minimum_detectable": float(stats.minimum_detectable(se, clusters)),
            "minimum_beyond_bound": float(stats.minimum_detectable(se, clusters, bound=bound)),
            "onsets_for_null": needs.onsets,
            "tasks_for_null": needs.clusters,
            "deff": needs.deff,
            "icc": needs.icc,
        }

    def gap_record(self, mode: str) -> dict:
        """The gap with its interval."""
        return effects.estimates(self.gap[mode][:, None], self.onsets.of_mode(mode), self.settings)[0]

    def bound_record(self) -> dict:
        """The bound as fixed, and as it comes out at the estimated gap."""
        settings = self.settings
        first = next(iter(self.compared.values()))
        cap = None if self.cap == UNCAPPED else self.cap
        return {"share": settings.bound_share, "cap": cap, "value": float(first.bound[0])}


def gate_record(gate: Gate) -> dict:
    """A gate for a record."""
    return {"gate": gate.number, "name": gate.name, "passed": gate.passed, "detail": gate.detail}
