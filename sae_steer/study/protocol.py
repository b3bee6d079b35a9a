"""The protocol on objects in memory: the arms of a direction, confirm texts, a measure; out comes a verdict.

1. Read every arm at every dose, each onset alone and all of a text together, with its control directions.
2. Compare the effects at the primary dose with the bound, Holm-corrected over variants and modes. Where a joint
   effect lies beyond it and the single one does not decide, read the full families of joint controls too, until
   one of them rules a special effect out.
3. Check the gates; judge each variant, then the study.

`of_pair` is one caller: it reads a pair and a cache, follows a plan written before, and adds sampled plans and traces.
`in_memory` is the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from sae_steer import stats
from sae_steer.edits.arms import Arm
from sae_steer.effects import estimates as effects
from sae_steer.effects.estimates import ControlFamily, DoseCurve, Effect
from sae_steer.effects.readings import (
    EDIT,
    JOINT_DOSES,
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
from sae_steer.effects.units import is_probability
from sae_steer.errors import InputError
from sae_steer.model.readout import Measure
from sae_steer.pair.texts import Text
from sae_steer.progress import Progress, silent
from sae_steer.settings import LEVEL, MODES, InterveneSettings
from sae_steer.study import gates
from sae_steer.study.arm_gates import ArmGates
from sae_steer.study.comparison import Comparison
from sae_steer.study.gates import Gate
from sae_steer.study.record import Evidence, Gap, JointControls, ModeResult, TestResults, VariantResult
from sae_steer.study.verdict import ModeTests, Verdict, VerdictName, judge, judge_study, listed


@dataclass(frozen=True)
class Weighed:
    """What the protocol says of one direction, and the trials that rests on."""

    verdict: VerdictName
    evidence: Evidence
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
) -> Weighed:
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
    weighing = Weighing(tuple(readings), onsets, measure, settings, texts)
    gap = Gap(*(weighing.gap_effect(mode) for mode in MODES))
    common = [*known_gates, gates.gap_gate(gap.single.mean, gap.single.low, gap.single.high, weighing.unit)]
    variants = tuple(weighing.judge(reading, common) for reading in readings)
    verdicts = {variant.name: Verdict(variant.verdict, variant.why) for variant in variants}
    evidence = Evidence(
        verdicts=listed(verdicts),
        unit=weighing.unit.name,
        primary_dose=settings.primary_dose,
        bound=weighing.bound_result(),
        gap=gap,
        baseline={mode: {r.arm.variant.name: float(r.base(mode).mean()) for r in readings} for mode in MODES},
        gates=tuple(common),
        variants=variants,
    )
    on_step(len(arms), len(arms), "judged")
    controls = [part for reading in readings for part in single_controls(reading, onsets, settings)]
    controls += [part for name in verdicts for part in weighing.joint_controls[name]]
    return Weighed(judge_study(verdicts), evidence, trials(readings, onsets, settings), tuple(controls))


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
class Weighing(Comparison):
    """All readings of a study, and the tests they are put to."""

    texts: Sequence[Text]
    joint_controls: dict[str, list[ControlRows]] = field(default_factory=dict)
    """By variant; filled as they are judged."""

    def judge(self, reading: ArmReading, common: Sequence[Gate]) -> VariantResult:
        """What a variant did, and its verdict."""
        arm, name, dose = reading.arm, reading.arm.variant.name, self.settings.primary_dose
        single = self._single_controls(reading)
        joint = self._joint_controls(reading, single)
        families = {"single": single, "joint": joint.families}
        tests = {mode: self._tests(reading, mode, families[mode]) for mode in MODES}
        gates_of_arm = ArmGates(self, self.texts, reading, single).checked()
        verdict = judge(arm.variant.predicted_sign, tests, [*common, *gates_of_arm], needs=self._needs(reading))
        return VariantResult(
            name=name,
            model=arm.model.name,
            site=f"blocks.{arm.layer}.hook_resid_post",
            predicted_sign=arm.variant.predicted_sign,
            flavour=arm.flavour,
            verdict=verdict.name,
            why=verdict.why,
            gates=gates_of_arm,
            single=self._mode_result(reading, "single", tests["single"]),
            joint=self._mode_result(reading, "joint", tests["joint"]),
            joint_doses=self._dose_curve(reading, JOINT_DOSES),
            elsewhere=self._elsewhere(reading),
            controls=single,
            joint_controls=joint,
            by_task=effects.task_means(reading.effect("single", EDIT, dose), self.onsets.single),
        )

    def _tests(self, reading: ArmReading, mode: str, families: Sequence[ControlFamily]) -> ModeTests:
        compared = self.compared[reading.arm.variant.name, mode]
        few = compared.clusters < stats.MIN_CLUSTERS_FOR_NULL
        return ModeTests(
            *self.corrected[reading.arm.variant.name, mode],
            inside=bool(compared.inside(LEVEL)[0]),
            specific_p=effects.worst_rank(families),
            inside_but_few=bool(compared.p_inside[0] < LEVEL and few),
        )

    def _needs(self, reading: ArmReading) -> str:
        """How much data would decide, by the mode that needs more."""
        most = max((self.sample_size(reading, mode) for mode in MODES), key=lambda size: size.onsets)
        return f"about {most.onsets:,} onsets of {most.clusters:,} tasks would decide"

    def _dose_curve(self, reading: ArmReading, mode: str) -> DoseCurve:
        onsets, probability = self.onsets.of_mode(mode), is_probability(self.measure)
        return effects.dose_curve(reading, mode, onsets, self.gap[mode], self.settings, probability=probability)

    def _mode_result(self, reading: ArmReading, mode: str, tests: ModeTests) -> ModeResult:
        return ModeResult(**vars(self._dose_curve(reading, mode)), tests=self._test_results(reading, mode, tests))

    def _elsewhere(self, reading: ArmReading) -> Effect:
        """The position control."""
        change = reading.elsewhere.value[:, 1:] - reading.elsewhere.value[:, :1]
        return effects.estimates(change, self.onsets.joint_doses, self.settings.resampling)[0]

    def _single_controls(self, reading: ArmReading) -> tuple[ControlFamily, ...]:
        base = reading.base("single")[:, None]
        means = {key: (value - base).mean(axis=0) for key, value in reading.controls.items()}
        observed = float(reading.effect("single", EDIT, self.settings.primary_dose).mean())
        return effects.control_families(observed, means, self.settings)

    def _joint_controls(self, reading: ArmReading, single: Sequence[ControlFamily]) -> JointControls:
        """Joint controls: a few of each family, or all of them where the verdict turns on the joint effect."""
        name, arm, settings = reading.arm.variant.name, reading.arm, self.settings
        rank = effects.worst_rank(single)
        decided = min(self.corrected[name, "single"]) <= LEVEL and rank is not None and rank <= LEVEL
        turns_on_joint = min(self.corrected[name, "joint"]) <= LEVEL and not decided
        families = arm.families if turns_on_joint else arm.ribbon(settings)
        planned = {family: len(units) for family, units in families.items()}
        if turns_on_joint:
            is_enough = partial(effects.is_outranked, planned=planned, settings=settings)
            values, places = read_joint_controls(arm, self.onsets, self.measure, settings, is_enough)
            edit = 1
        else:
            values = reading.readings[JOINT_DOSES]
            places = families_of(families, after=1 + len(reading.columns[JOINT_DOSES]))
            edit = reading.column(JOINT_DOSES, EDIT, settings.primary_dose)
        means = (values.value - values.value[:, :1]).mean(axis=0)
        self.joint_controls[name] = joint_controls(reading, values, places, self.onsets, settings)
        by_family = {(family, settings.primary_dose): means[at] for family, at in places.items()}
        return JointControls(
            n=len(self.onsets.joint_doses),
            tasks=self.onsets.joint_doses.tasks,
            edit_mean=float(means[edit]),
            families=effects.control_families(float(means[edit]), by_family, settings, planned),
        )

    def _test_results(self, reading: ArmReading, mode: str, tests: ModeTests) -> TestResults:
        compared, needs = self.compared[reading.arm.variant.name, mode], self.sample_size(reading, mode)
        effect, task = reading.effect(mode, EDIT, self.settings.primary_dose), self.onsets.of_mode(mode).task
        se, clusters, bound = float(compared.effect.se[0]), compared.clusters, float(compared.bound[0])
        flips = stats.sign_flip_p(effect[:, None], task, **vars(self.settings.resampling))
        return TestResults(
            low_90=float(compared.effect.low[0]),
            high_90=float(compared.effect.high[0]),
            p_above_holm=tests.p_above,
            p_below_holm=tests.p_below,
            p_inside=float(compared.p_inside[0]),
            inside=tests.inside,
            specific_p=tests.specific_p,
            detectable_p=float(flips[0]),
            minimum_detectable=float(stats.minimum_detectable(se, clusters)),
            minimum_beyond_bound=float(stats.minimum_detectable(se, clusters, bound=bound)),
            onsets_for_null=needs.onsets,
            tasks_for_null=needs.clusters,
            deff=needs.deff,
            icc=needs.icc,
        )
