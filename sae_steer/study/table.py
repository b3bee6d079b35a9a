"""A study's record as lines for a terminal: the verdict first, then what it rests on."""

from collections.abc import Mapping

from sae_steer.row_filter import LeftOut
from sae_steer.settings import MODES


def table(record: Mapping) -> str:
    """The verdict, why, and what was measured at the primary dose."""
    if not record["tested"]:
        return f"verdict: {record['verdict']}: {record['reason']}"
    quick = " (quick: small control families, a first look)" if record["quick"] else ""
    gap = record["gap"]
    lines = [
        f"verdict: {record['verdict']}{quick}; {record['verdicts']}",
        *_firings(record),
        *_left_out(record.get("rows_left_out")),
        f"target tokens begin {record['target_tokens']['coverage']:.1%} of the target steps; the models differ by "
        f"{_points(gap['single'])} points at {gap['single']['n']} onsets of {gap['single']['tasks']} tasks; bound "
        f"{100 * record['bound']['value']:.2f} points",
        f"{'variant':<12} {'model':<10} {'direction':<12} {'single, points':>24} {'joint, points':>24} "
        f"{'of the gap':>11} {'worst p':>8} {'could see':>10}",
        *(_variant(record, variant) for variant in record["variants"]),
        *(f"{variant['variant']}: {variant['verdict']}: {variant['why']}" for variant in record["variants"]),
        *(_sampled(variant) for variant in record["variants"] if variant["sampled"]),
        *([NO_PLANS] if without_plans(record) else []),
        *_group(record.get("group")),
    ]
    return "\n".join(lines)


NO_PLANS = "no plans were sampled, by choice (run samples them with --full); no verdict rests on them"


def without_plans(record: Mapping) -> bool:
    """Whether the study was asked for without sampled plans."""
    return record.get("provenance", {}).get("settings", {}).get("generations") == 0


def primary(record: Mapping, variant: Mapping, mode: str) -> Mapping:
    """A variant's effect at the primary dose."""
    return next(row for row in variant[mode]["doses"] if row["dose"] == record["primary_dose"])


def _firings(record: Mapping) -> list[str]:
    firings = record["firings"]
    if firings is None:
        return []
    return [
        f"fires at {firings['onsets']} of {firings['of_onsets']} onsets, of {firings['tasks']} tasks; dose 1 adds or "
        f"takes {firings['s']:.3g}, {firings['s_share_of_resid_norm']:.1%} of the median residual norm "
        f"({firings['s_from']})"
    ]


def _left_out(counted: Mapping | None) -> list[str]:
    """The rows that maps, sizes and covariances were not read from."""
    told = counted and LeftOut(**counted).sentence("tune texts")
    return [told] if told else []


def _variant(record: Mapping, variant: Mapping) -> str:
    single, joint = (primary(record, variant, mode) for mode in ("single", "joint"))
    bounded = single["share_low"] is not None and single["share_high"] is not None
    share = f"{100 * single['share']:+.1f} %" if bounded else "n/a"
    tests = variant["single"]["tests"]
    p = "n/a" if tests["specific_p"] is None else f"{tests['specific_p']:.3f}"
    line = (
        f"{variant['variant']:<12} {variant['model']:<10} {variant['direction']:<12} {_points(single):>24} "
        f"{_points(joint):>24} {share:>11} {p:>8} {100 * tests['minimum_detectable']:>10.2f}"
    )
    if single["coverage"] == 1:
        return line
    return f"{line}  {100 * single['mean_where_edited']:+.2f} at the {single['coverage']:.0%} where it fires"


def _sampled(variant: Mapping) -> str:
    strict = variant["sampled"]["strict"]
    if strict["delta"] is None:
        return f"{variant['variant']:<12} in sampled plans no step was written, so that no rate can be told"
    paired = strict["paired"]
    same = f"{100 * paired['delta']:+.1f}" + ("" if paired["p"] is None else f" (p {paired['p']:.3f})")
    return (
        f"{variant['variant']:<12} {variant['model']:<10} in sampled plans {100 * strict['delta']:+.1f} points, "
        f"unedited against unedited [{100 * strict['null_low']:+.1f}, {100 * strict['null_high']:+.1f}]; with shared "
        f"noise {same}"
    )


def _group(group: Mapping | None) -> list[str]:
    if group is None:
        return []
    others = ", ".join(str(one["feature"]) for one in group["features"]) or "none"
    single, joint = (f"{_points(group[mode])} (alone {100 * group[mode]['alone']['mean']:+.2f})" for mode in MODES)
    return [f"zero-ablated with the features most like it ({others}): {single} single, {joint} joint"]


def _points(row: Mapping) -> str:
    """A mean and its interval in points of probability."""
    return f"{100 * row['mean']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]"
