"""What a study found, as typed values; how they are written, and how they are read again.

A `Study` holds what was studied, the verdict and, if the direction could be tested, the `Evidence`. `results.json` is
its `record()`; `load_study` is the one reader. A record of another schema is refused with what to do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sae_steer.align import BasisCheck
from sae_steer.effects.estimates import ControlFamily, DoseCurve, EditEffect, Effect, TaskMean
from sae_steer.effects.firings import Firings
from sae_steer.effects.group import Group
from sae_steer.effects.readings import ControlRows
from sae_steer.effects.sampled import SampledArm
from sae_steer.effects.trace import Trace
from sae_steer.effects.units import UnitName
from sae_steer.errors import InputError
from sae_steer.records import read_json
from sae_steer.row_filter import LeftOut
from sae_steer.study.gates import Gate
from sae_steer.study.verdict import VerdictName
from sae_steer.typed_json import ASIDE, FLAT, NotSuchRecordError, as_json, key, of_json

SCHEMA = 2
"""Of `results.json`; raised whenever a key changes its place or its meaning."""
Mode = Literal["single", "joint"]


@dataclass(frozen=True, kw_only=True)
class TestResults:
    """What the tests of one mode of a variant say, and how much more data they would need."""

    low_90: float
    """Of the interval that a null needs inside the bound."""
    high_90: float
    p_above_holm: float
    p_below_holm: float
    p_inside: float
    """Of equivalence."""
    inside: bool
    """Whether the interval lies inside the bound, on tasks enough for a null."""
    specific_p: float | None
    """The worst rank p among the control families; None where none is large enough to be ranked against."""
    detectable_p: float
    """That the effect is zero, by sign flips: a tag, no verdict."""
    minimum_detectable: float
    """The least true effect that would be told from zero in 80 % of studies."""
    minimum_beyond_bound: float
    onsets_for_null: int
    tasks_for_null: int
    deff: float
    icc: float

    __test__ = False  # not one of pytest's


@dataclass(frozen=True, kw_only=True)
class ModeResult(DoseCurve):
    """A variant read in one mode, and its tests."""

    tests: TestResults


@dataclass(frozen=True, kw_only=True)
class JointControls:
    """Control directions beside the joint edit, on some of the texts."""

    n: int
    tasks: int
    edit_mean: float
    """Of the edit itself on these texts."""
    families: tuple[ControlFamily, ...]


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One intervention: what it did in each mode, what stands beside it, and its verdict."""

    name: str = field(metadata=key("variant"))
    model: str
    site: str
    predicted_sign: int
    flavour: str = field(metadata=key("direction"))
    """How the direction came into the edited stream: `raw` or `transported`."""
    verdict: VerdictName
    why: str
    gates: tuple[Gate, ...]
    single: ModeResult
    joint: ModeResult
    joint_doses: DoseCurve
    """All doses, jointly on some of the texts."""
    elsewhere: Effect
    """The same edit at random positions that are no onsets."""
    controls: tuple[ControlFamily, ...]
    """Each onset edited alone."""
    joint_controls: JointControls
    by_task: tuple[TaskMean, ...]
    sampled: SampledArm | None = None
    """None where the texts are no plans."""
    trace: Trace | None = None

    @property
    def modes(self) -> dict[Mode, ModeResult]:
        """Both, by name."""
        return {"single": self.single, "joint": self.joint}

    @property
    def curves(self) -> list[tuple[Mode, DoseCurve]]:
        """All doses: each onset alone, and jointly on some of the texts."""
        return [("single", self.single), ("joint", self.joint_doses)]


@dataclass(frozen=True)
class BoundResult:
    """The bound as it was fixed, and as it comes out at the estimated gap."""

    share: float
    cap: float | None
    """None for a measure that is no probability and was given none."""
    value: float


@dataclass(frozen=True)
class Gap:
    """The measure in the target model minus that in the reference, at the same onsets."""

    single: Effect
    joint: Effect


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that was measured of a direction that could be tested."""

    verdicts: str
    """The variants under each verdict."""
    unit: UnitName = "points"
    """What effects are told in."""
    primary_dose: float
    bound: BoundResult
    gap: Gap
    baseline: Mapping[Mode, Mapping[str, float]]
    """The unedited measure by mode and variant."""
    gates: tuple[Gate, ...]
    """Those that hold of all variants alike."""
    variants: tuple[VariantResult, ...]
    basis: Mapping[str, BasisCheck] = field(default_factory=dict)
    """Held-out R2 of the maps from the target's stream to the reference's, by place."""
    rows_left_out: LeftOut | None = None
    """Of the tune texts, the rows that maps, sizes and covariances were not read from."""
    group: Group | None = None
    """Of a feature: what ablating it together with those most like it does."""

    def variant(self, name: str) -> VariantResult | None:
        """The variant of a name, if it was made."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def primary(self, variant: VariantResult, mode: Mode) -> EditEffect:
        """A variant's effect at the dose that is tested."""
        return variant.modes[mode].at(self.primary_dose)


@dataclass(frozen=True)
class PlanChange:
    """What a plan that was replaced said of a key."""

    key: str
    was: str
    now: str


@dataclass(frozen=True)
class PlanNote:
    """The plan a study followed, and what was changed in it."""

    file: str
    hash: str
    changes: tuple[PlanChange, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "PlanNote":
        """What `Plan.record` says."""
        return of_json(cls, record, "the plan")


@dataclass(frozen=True)
class TokenSet:
    """The tokens whose probability is measured."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    coverage: float
    """Share of the target steps that they begin."""

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "TokenSet":
        """What `TargetTokens.described` says."""
        return of_json(cls, described, "the target tokens")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What one direction does, with a verdict; where it could not be tested, the reason."""

    direction: str
    """What was studied, in words."""
    verdict: VerdictName
    """INVALID where a gate fails under every variant, and where the direction could not be tested at all."""
    quick: bool
    """Whether the control families are too small for more than a first look."""
    reason: str | None = None
    """Why it could not be tested."""
    feature: int | None = None
    dictionary: str | None = None
    dictionary_sha256: str | None = None
    specific_features: int | None = None
    """Features of the scan that are specific to the target, and so no controls."""
    pair: str | None = None
    """None, as what follows, for objects in memory."""
    note: str | None = None
    target_tokens: TokenSet | None = None
    plan: PlanNote | None = None
    provenance: Mapping[str, Any] | None = None
    firings: Firings | None = None
    """Of a feature."""
    evidence: Evidence | None = field(default=None, metadata=FLAT)
    trials: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False, metadata=ASIDE)
    """One row a prompt, onset, variant, dose, direction and mode."""
    controls: Sequence[ControlRows] = field(default=(), repr=False, compare=False, metadata=ASIDE)
    """The trials of control directions: rows of `trials.parquet` with a `family`, which `load_study` leaves there."""

    @property
    def tested(self) -> bool:
        """Whether the direction could be tested at all."""
        return self.evidence is not None

    @property
    def measured(self) -> Evidence:
        """The evidence on a direction that could be tested."""
        assert self.evidence is not None, "a study that could not be tested has no evidence"
        return self.evidence

    @property
    def title(self) -> str:
        """What was studied, as a heading says it."""
        return self.direction.capitalize()

    @property
    def variants(self) -> tuple[VariantResult, ...]:
        """Every intervention that was made; none if it could not be tested."""
        return self.evidence.variants if self.evidence else ()

    def record(self) -> dict:
        """The study as JSON holds it."""
        return {"schema": SCHEMA, "tested": self.tested, **as_json(self)}

    def table(self) -> str:
        """The verdict, why, and what was measured at the primary dose."""
        from sae_steer.study.table import table

        return table(self)

    def save(self, folder: Path) -> Path:
        """Write `trials.parquet`, the released study's records, and `results.json`; returns the latter."""
        from sae_steer.study.files import save_study

        return save_study(self, folder)


def read_study(path: Path) -> Study:
    """The study of a `results.json`, without its trials."""
    record = read_json(path)
    again = "make it again with `sae-steer intervene --force`, or read it with the version that wrote it"
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} is a record of schema {schema}, and this version reads {SCHEMA}; {again}")
    try:
        return of_json(Study, record)
    except NotSuchRecordError as error:
        raise InputError(f"{path} is no whole study: {error}; {again}") from error
