"""What the studies of a selftest add up to: right and wrong verdicts by kind, error rates, level and power.

Rates of studies have exact intervals (Clopper and Pearson 1934), for studies are independent; the verdicts of one
study share its tasks, so a study counts once: as right if every verdict of it is, as wrong if any is. Fresh
directions of one study share its controls, so the level of the rank test has an interval that resamples studies.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from scipy.stats import binomtest

from sae_steer import stats
from sae_steer.selftest.kinds import KINDS, NEITHER, SIGNS, TUNED, VARIANTS, right_of
from sae_steer.settings import MODES
from sae_steer.study.verdict import CAUSAL, NON_SPECIFIC, NULL

EDGES = (0.0, 0.35, 0.7, 0.95, 1.05, 1.5, 2.0, 3.0, 4.5, 7.0, 10.0, np.inf)
"""Of the planted effect, in bounds, for the power curve."""


def summary(studies: Sequence[Mapping], levels: Sequence[Mapping]) -> dict:
    """The record of all studies."""
    rows = [_row(study, variant, result) for study in studies for variant, result in study["variants"].items()]
    counted = [row for row in rows if row["promised"] and row["due"] != NEITHER]
    inert = [row for row in counted if row["kind"] == "inert"]
    causal = [row for row in counted if row["due"] == CAUSAL]
    return {
        "studies": Counter(study["kind"] for study in studies),
        "right": _of_studies(counted, "right"),
        "right_by_kind": {kind: _of_studies([r for r in counted if r["kind"] == kind], "right") for kind in KINDS},
        "inert_called_causal": _of_studies([{**row, "claim": row["verdict"] == CAUSAL} for row in inert]),
        "causal_called_null": _of_studies([{**row, "claim": row["verdict"] == NULL} for row in causal]),
        "due": {kind: right_of(kind) for kind in KINDS},
        "confusion": {kind: _confusion([row for row in rows if row["kind"] == kind]) for kind in KINDS},
        "study_verdicts": {kind: Counter(s["verdict"] for s in studies if s["kind"] == kind) for kind in KINDS},
        "failed_gates": {kind: _failed([s for s in studies if s["kind"] == kind]) for kind in KINDS},
        "not_as_promised": _broken(rows),
        "boundary": _boundary(rows),
        "level": {family: _level(levels, family) for family in _families(levels)},
        "power": _power(rows),
    }


def rate(hits: Sequence[bool]) -> dict | None:
    """A share of independent trials with its exact 95 % interval; None without any."""
    if not hits:
        return None
    test = binomtest(int(sum(hits)), len(hits))
    ends = test.proportion_ci(0.95, method="exact")
    return {"hits": int(sum(hits)), "n": len(hits), "rate": test.statistic, "low": ends.low, "high": ends.high}


def _of_studies(rows: Sequence[Mapping], what: str = "claim") -> dict:
    """{verdicts, hits among them, studies}: `right` holds of a study if of all its verdicts, a claim if of any."""
    together = all if what == "right" else any
    by_study: dict[tuple[str, int], list[bool]] = {}
    for row in rows:
        by_study.setdefault((row["kind"], row["number"]), []).append(row[what])
    return {
        "verdicts": len(rows),
        "hits": sum(row[what] for row in rows),
        "studies": rate([together(held) for held in by_study.values()]),
    }


def _row(study: Mapping, variant: str, result: Mapping) -> dict:
    sign = SIGNS[variant]
    return {
        "kind": study["kind"],
        "number": study["number"],
        "variant": variant,
        "verdict": result["verdict"],
        "promised": result["promised"],
        "right": result["right"],
        "due": right_of(study["kind"]).get(variant),
        "bounds": max(sign * result["truth"][mode] for mode in MODES) / study["bound"],
    }


def _confusion(rows: Sequence[Mapping]) -> dict[str, dict[str, int]]:
    """{variant: {verdict: how often}}, where the truth is what the kind promises, or nothing is promised."""
    counted = [row for row in rows if row["promised"] is not False]
    return {v: dict(Counter(row["verdict"] for row in counted if row["variant"] == v)) for v in VARIANTS}


def _failed(studies: Sequence[Mapping]) -> dict[str, int]:
    """How often each gate failed, over studies and their variants."""
    of_studies = [gate["gate"] for study in studies for gate in study["gates"] if not gate["passed"]]
    results = [result for study in studies for result in study["variants"].values()]
    of_variants = [gate for result in results for gate in result["failed_gates"]]
    return dict(Counter([*of_studies, *of_variants]))


def _broken(rows: Sequence[Mapping]) -> dict[str, int]:
    """Variants left out because the measured truth is not what the kind promises."""
    return dict(Counter(f"{row['kind']}, {row['variant']}" for row in rows if row["promised"] is False))


def _boundary(rows: Sequence[Mapping]) -> dict:
    """At an effect equal to the bound: how often NULL, CAUSAL, and beyond the bound whatever the controls say."""
    at = [row for row in rows if row["kind"] == "boundary" and row["promised"]]
    claims = {"null": (NULL,), "causal": (CAUSAL,), "beyond": (CAUSAL, NON_SPECIFIC)}
    return {
        variant: {
            claim: rate([row["verdict"] in names for row in at if row["variant"] == variant])
            for claim, names in claims.items()
        }
        for variant in TUNED.values()
    }


def _families(levels: Sequence[Mapping]) -> list[str]:
    return sorted({family for study in levels for result in study["variants"].values() for family in result})


def _level(levels: Sequence[Mapping], family: str) -> dict:
    """How many fresh directions of a family its own controls call special at 5 %, over studies and models."""
    counted = [
        (study["number"], variant[family]["special"], variant[family]["fresh"])
        for study in levels
        for variant in study["variants"].values()
        if variant.get(family, {}).get("fresh")
    ]
    number, special, fresh = (np.array(column) for column in zip(*counted, strict=True))
    totals = {"special": int(special.sum()), "fresh": int(fresh.sum()), "studies": len(np.unique(number))}
    if totals["studies"] < 2:
        return {**totals, "rate": totals["special"] / totals["fresh"], "low": None, "high": None}
    share = stats.cluster_bootstrap_ratio(special[:, None], fresh[:, None], number, draws=10_000, seed=0)
    return {**totals, "rate": float(share.mean[0]), "low": float(share.low[0]), "high": float(share.high[0])}


def _power(rows: Sequence[Mapping]) -> list[dict]:
    """By the size of the planted effect: how often CAUSAL, NULL, and beyond the bound."""
    sizes = np.array([row["bounds"] for row in rows])
    bins = []
    for low, high in pairwise(EDGES):
        inside = [row for row, size in zip(rows, sizes, strict=True) if low <= abs(size) < high]
        if not inside:
            continue
        bins.append(
            {
                "from": low,
                "to": None if np.isinf(high) else high,
                "mean": float(np.mean([abs(row["bounds"]) for row in inside])),
                "causal": rate([row["verdict"] == CAUSAL for row in inside]),
                "null": rate([row["verdict"] == NULL for row in inside]),
            }
        )
    return bins
