"""A study as lines for a terminal: the verdict first, then what it rests on."""

from sae_steer.effects.estimates import Effect
from sae_steer.effects.firings import Firings
from sae_steer.effects.group import Group, GroupEffect
from sae_steer.effects.sampled import SampledArm
from sae_steer.effects.units import UNITS, Unit
from sae_steer.row_filter import LeftOut
from sae_steer.study.record import Evidence, Study, VariantResult


def table(study: Study) -> str:
    """The verdict, why, and what was measured at the primary dose."""
    evidence = study.evidence
    if evidence is None:
        return f"verdict: {study.verdict}: {study.reason}"
    quick = " (quick: small control families, a first look)" if study.quick else ""
    unit = UNITS[evidence.unit]
    lines = [
        f"verdict: {study.verdict}{quick}; {evidence.verdicts}",
        *_firings(study.firings),
        *_left_out(evidence.rows_left_out),
        _gap(study, evidence, unit),
        f"{'variant':<12} {'model':<10} {'direction':<12} {f'single, {unit.short}':>24} {f'joint, {unit.short}':>24} "
        f"{'of the gap':>11} {'worst p':>8} {'could see':>10}",
        *(_variant(evidence, variant, unit) for variant in evidence.variants),
        *(f"{variant.name}: {variant.verdict}: {variant.why}" for variant in evidence.variants),
        *(_sampled(variant, variant.sampled) for variant in evidence.variants if variant.sampled),
        *([NO_PLANS] if without_plans(study) else []),
        *_group(evidence.group, unit),
    ]
    return "\n".join(lines)


NO_PLANS = "no plans were sampled, by choice (run samples them with --full); no verdict rests on them"


def without_plans(study: Study) -> bool:
    """Whether the study was asked for without sampled plans."""
    return (study.provenance or {}).get("settings", {}).get("generations") == 0


def _firings(firings: Firings | None) -> list[str]:
    if firings is None or firings.s is None or firings.s_share_of_resid_norm is None:
        return []
    return [
        f"fires at {firings.onsets} of {firings.of_onsets} onsets, of {firings.tasks} tasks; dose 1 adds or takes "
        f"{firings.s:.3g}, {firings.s_share_of_resid_norm:.1%} of the median residual norm ({firings.s_from})"
    ]


def _left_out(rows: LeftOut | None) -> list[str]:
    """The rows that maps, sizes and covariances were not read from."""
    sentence = rows and rows.sentence("tune texts")
    return [sentence] if sentence else []


def _gap(study: Study, evidence: Evidence, unit: Unit) -> str:
    tokens, gap = study.target_tokens, evidence.gap.single
    begins = f"target tokens begin {tokens.coverage:.1%} of the target steps; " if tokens else ""
    bound = f"bound {unit.plain(evidence.bound.value)} {unit.name}"
    where = f"{gap.n} onsets of {gap.tasks} tasks"
    return f"{begins}the models differ by {_interval(gap, unit)} {unit.name} at {where}; {bound}"


def _variant(evidence: Evidence, variant: VariantResult, unit: Unit) -> str:
    single, joint = (_interval(evidence.primary(variant, mode), unit) for mode in ("single", "joint"))
    effect, tests = evidence.primary(variant, "single"), variant.single.tests
    share = "n/a" if effect.share is None else f"{100 * effect.share:+.1f} %"
    p = "n/a" if tests.specific_p is None else f"{tests.specific_p:.3f}"
    line = (
        f"{variant.name:<12} {variant.model:<10} {variant.flavour:<12} {single:>24} {joint:>24} {share:>11} {p:>8} "
        f"{unit.plain(tests.minimum_detectable):>10}"
    )
    if effect.coverage == 1 or effect.mean_where_edited is None:
        return line
    return f"{line}  {unit.signed(effect.mean_where_edited)} at the {effect.coverage:.0%} where it fires"


def _sampled(variant: VariantResult, sampled: SampledArm) -> str:
    strict, paired = sampled.strict, sampled.strict.paired
    if strict.delta is None:
        return f"{variant.name:<12} {variant.model:<10} in sampled plans wrote no step, so that no rate can be told"
    same = f"{100 * paired.delta:+.1f}" + ("" if paired.p is None else f" (p {paired.p:.3f})")
    null = f"[{100 * strict.null_low:+.1f}, {100 * strict.null_high:+.1f}]"
    return (
        f"{variant.name:<12} {variant.model:<10} in sampled plans {100 * strict.delta:+.1f} points, unedited against "
        f"unedited {null}; with shared noise {same}"
    )


def _group(group: Group | None, unit: Unit) -> list[str]:
    if group is None:
        return []
    others = ", ".join(str(one.feature) for one in group.features) or "none"

    def said(effect: GroupEffect) -> str:
        return f"{_interval(effect, unit)} (alone {unit.signed(effect.alone.mean)})"

    effects = f"{said(group.single)} single, {said(group.joint)} joint"
    return [f"zero-ablated with the features most like it ({others}): {effects}"]


def _interval(effect: Effect, unit: Unit) -> str:
    """A mean and its interval."""
    return f"{unit.signed(effect.mean)} [{unit.signed(effect.low)}, {unit.signed(effect.high)}]"
