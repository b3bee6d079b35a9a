"""Made-up records, in the shapes the commands write."""

from pathlib import Path

import numpy as np

from sae_steer.records import write_json, write_table
from sae_steer.study.record import SCHEMA

DICTIONARY, CACHE, PAIR = "d" * 64, "c" * 64, "a" * 64
DOSES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


def origin(**inputs: str) -> dict:
    return {"sae_steer": "0.1.0", "commit": "f" * 40, "settings": {"seed": 0, "knob": 0.125}, "inputs": inputs}


def training() -> dict:
    return {
        "provenance": origin(rows="e" * 64, model="adhd", layer="2"),
        "model": "adhd",
        "layer": 2,
        "hook": "blocks.2.hook_resid_post",
        "model_sha256": "b" * 64,
        "final_fve": 0.8937,
        "final_l0": 39.97,
        "dead_pct_train": 0.0244,
        "dead_pct_heldout": 1.4648,
        "heldout_rows": 123_457,
        "train_rows": 765_433,
        "density_heldout": {"log10_edges": [-6.0, -4.5, -3.0, -1.5, 0.0], "counts": [31, 2117, 1871, 17], "dead": 60},
        "steps": 1464,
    }


def feature_table(d_sae: int = 400, onsets: int = 8770) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    rate = random.beta(0.3, 4, d_sae)
    target = np.minimum((rate * random.lognormal(0, 0.4, d_sae) * onsets).astype(int), onsets)
    reference = (rate * onsets).astype(int)
    target[:40], reference[:40] = (random.uniform(0.02, 0.9, 40) * onsets).astype(int), random.poisson(6, 40)
    target[7], reference[7], target[25], reference[25], target[300:], reference[300:] = 7901, 0, 5203, 4, 0, 0
    table = {
        "feature": np.arange(d_sae),
        "target_hits": target,
        "reference_hits": reference,
        "onsets": np.full(d_sae, onsets),
    }
    for name, hits in (("target", target), ("reference", reference)):
        share = hits / onsets
        table |= {
            f"{name}_rate": share,
            f"{name}_rate_low": 0.9 * share,
            f"{name}_rate_high": np.minimum(1.1 * share + 4e-4, 1),
        }
    odds = np.log((target + 0.5) / (reference + 0.5))
    return table | {
        "log_odds": odds,
        "log_odds_low": odds - 0.8,
        "log_odds_high": odds + 0.8,
        "p": np.exp(-np.abs(odds) * 9),
        "q": np.exp(-np.abs(odds) * 8),
        "percentile": np.linspace(0, 100, d_sae),
        "alive": target + reference > 0,
        "specific": (target >= 0.01 * onsets) & (target >= 10 * reference),
    }


def scan(table: dict[str, np.ndarray], target: str = "adhd") -> dict:
    def row(feature: int) -> dict:
        return {name: column[feature].item() for name, column in table.items()}

    specific = np.flatnonzero(table["specific"])
    order = sorted(specific.tolist(), key=lambda feature: -table["log_odds_low"][feature])
    return {
        "provenance": origin(cache=CACHE, dictionary=DICTIONARY),
        "sae_results": {
            "adhd_L2": {"final_fve": 0.8937, "final_l0": 39.97, "dead_pct_train": 0.0244, "dead_pct_heldout": 1.4648}
        },
        "primary_count": len(specific),
        "symmetry_count": None,
        "layer_control_count": None,
        "primary_top_features": [{"feat_id": 7, "adhd_rate": 0.5, "std_rate": 0.0}],
        "dictionary": "adhd_L2_hook_resid_post",
        "target": target,
        "reference": "standard",
        "cells": {
            f"{m}/{v}/{p}": 5000 + i
            for i, (m, v, p) in enumerate(
                (m, v, p) for m in ("adhd", "standard") for v in ("standard", "adhd") for p in ("onset", "elsewhere")
            )
        },
        "onsets": 8770,
        "tasks": 187,
        "alive": int(table["alive"].sum()),
        "d_sae": len(table["feature"]),
        "criteria": {
            "min_rate": 0.01,
            "max_q": 0.05,
            "min_ratio": 10.0,
            "min_task_share": 0.15,
            "like_rate": 0.59,
            "like_max_reference": 0.005,
        },
        "top": [row(feature) for feature in order[:20]],
        "like_2504": row(25),
    }


def estimate(mean: float, half: float, n: int) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half, "prompt_weighted": 0.97 * mean, "n": n, "tasks": 143}


def edited(mean: float, half: float, n: int, dose: float) -> dict:
    """What one direction at one dose did."""
    whole = estimate(mean, half, n) | {"dose": dose, "mean_delivered_norm": 1.37 * dose, "coverage": 1.0}
    whole |= {"rows_edited": n if dose else 0, "tasks_edited": 143, "mean_where_edited": 0.0}
    whole |= {"where_edited_low": None, "where_edited_high": None, "log_odds": 0.03, "log_odds_rows": n}
    return whole | {"kl": 0.0021, "off_target_nats": None, "off_target_rows": 0}


def effects(slope: float, n: int) -> dict:
    rows = []
    for dose in DOSES:
        row = edited(slope * dose, abs(0.31 * slope * dose) + (2e-4 if dose else 0), n, dose)
        share = {"share": row["mean"] / 0.243, "share_low": row["low"] / 0.25, "share_high": row["high"] / 0.24}
        rows.append(row | share)
    beside = {
        "unembedding": edited(3.1 * slope, 0.0021, n, 1.0),
        "full patch, raw": edited(9.7 * slope, 0.0043, n, 1.0),
        "full patch, rotated": edited(9.3 * slope, 0.0041, n, 1.0),
    }
    return {"n": n, "tasks": 143, "doses": rows, "beside": beside, "tests": tests(slope)}


def tests(slope: float) -> dict:
    return {
        "low_90": slope - 0.0013,
        "high_90": slope + 0.0014,
        "specific_p": 0.0713,
        "minimum_detectable": 0.00191,
        "p_above_holm": 0.0311,
        "p_below_holm": 1.0,
        "p_inside": 0.4,
        "inside": False,
        "detectable_p": 0.0021,
        "minimum_beyond_bound": 0.0139,
        "onsets_for_null": 2311,
        "tasks_for_null": 271,
        "deff": 1.31,
        "icc": 0.041,
    }


def family(name: str, seed: int) -> dict:
    means = np.random.default_rng(seed).normal(0, 0.0011, 99)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    ribbon = [{"dose": dose, "low": -0.001 * dose, "high": 0.0012 * dose, "count": 8} for dose in DOSES if dose != 1]
    known = {"family": name, "count": 99, "planned": 99, "ranked": True, "low": low, "high": high, "rank_p": 0.07}
    return known | {"means": means.tolist(), "ribbon": ribbon}


def gate(number: str, passed: bool = True) -> dict:
    return {"gate": number, "name": "what must hold", "passed": passed, "detail": "0.9731 was seen"}


def matcher(rate: float, delta: float) -> dict:
    null = {"null_low": -0.0418, "null_high": 0.0397, "null_sd": 0.021, "p": 0.3417}
    paired = {"delta": 0.37 * delta, "low": -0.011, "high": 0.017, "p": 0.431, "plans": 320}
    base = {"baseline_rate": rate - 0.8 * delta, "baseline_rate_all_seeds": rate - 0.8 * delta}
    return {"rate": rate, **base, "delta": delta, "paired": paired, **null}


def trace(slope: float) -> dict:
    """Of an edit after block 2 that is half overwritten in block 4."""
    parts = [(name, what) for name in ("resid", "attention", "mlp") for what in ("norm", "projection")]
    blocks = []
    for block, carried in zip(range(2, 6), (1.37, 1.52, 0.71, 0.66), strict=True):
        values = (carried, slope * carried, *(None if block == 2 else 0.1 * carried + i for i in range(4)))
        found = {f"{name}_{what}": value for (name, what), value in zip(parts, values, strict=True)}
        blocks.append({"block": block, "n": 231, **found})
    direct = estimate(0.07 * slope, 0.0003, 240) | {"whole": estimate(0.93 * slope, 0.0021, 240)}
    return {"blocks": blocks, "direct": direct}


def group(slope: float) -> dict:
    others = [{"feature": 31, "cosine": 0.417, "cofiring": 0.832}, {"feature": 12, "cosine": 0.306, "cofiring": 0.149}]
    found = {"features": others}
    for mode, n, times in (("single", 1187, 2.3), ("joint", 4291, 2.9)):
        alone = estimate(slope, 0.0004, n)
        found[mode] = estimate(times * slope, 0.0011, n) | {"rows_edited": n // 3, "alone": alone}
    return found


def variant(name: str, model: str, sign: int, slope: float, seed: int, *, sampled: bool = True) -> dict:
    controls = [family(kind, seed + i) for i, kind in enumerate(("isotropic", "covariance", "matched features"))]
    cut_short = family("isotropic", seed + 7) | {"planned": 199}
    joint = {"n": 871, "tasks": 59, "edit_mean": 1.5 * slope, "families": [cut_short]}
    matched = {"strict": matcher(0.413, slope), "lenient": matcher(0.447, 1.2 * slope)}
    return {
        "variant": name,
        "model": model,
        "site": "blocks.2.hook_resid_post",
        "predicted_sign": sign,
        "single": effects(slope, 1187),
        "joint": effects(1.6 * slope, 4291),
        "joint_doses": effects(1.5 * slope, 871),
        "elsewhere": estimate(0.3 * slope, 0.0007, 871),
        "direction": "transported" if sign > 0 else "raw",
        "verdict": "NULL",
        "why": "the 90 % interval lies inside the bound, single and joint",
        "gates": [gate("1"), gate("6a", passed=False)],
        "controls": controls,
        "joint_controls": joint,
        "by_task": [{"task": task, "n": 8, "mean": 0.001 * (task - 70)} for task in range(143)],
        "trace": trace(slope),
        "sampled": {"texts": 80, "steps": 1203, "mean_step_count": 15.04, **matched} if sampled else None,
    }


COUNTED = {"single_onsets": 611, "of_single_onsets": 1187, "needs_onsets": 50, "needs_tasks": 30}


def study(feature: int, *, pair: str = "small", dictionary: str = DICTIONARY, sampled: bool = True) -> dict:
    kinds = (
        ("inject", "standard", 1, 0.0061),
        ("subtract", "adhd", -1, -0.0138),
        ("zero_ablate", "adhd", -1, 0.0007),
        ("upstream", "standard", 1, 0.0004),
    )
    before = {"inject": 0.0312, "subtract": 0.2743, "zero_ablate": 0.2743, "upstream": 0.0312}
    where = "1404 active onsets of the tune split"
    firings = {"onsets": 2711, "of_onsets": 4291, "tasks": 141} | COUNTED
    firings |= {"s": 3.217, "s_from": where, "s_share_of_resid_norm": 0.2193}
    return {
        "schema": SCHEMA,
        "provenance": origin(pair=PAIR, cache=CACHE, dictionary=dictionary, feature=str(feature)),
        "dictionary": "adhd_L2_hook_resid_post",
        "dictionary_sha256": dictionary,
        "feature": feature,
        "direction": f"feature {feature}",
        "plan": {"file": "plan.toml", "hash": "8" * 64, "changes": [{"key": "settings.seed", "was": "3", "now": "4"}]},
        "note": f"an index belongs to its dictionary: feature {feature} of this one is no other's feature {feature}",
        "pair": pair,
        "verdict": "NULL",
        "verdicts": "NULL: inject, subtract, zero_ablate, upstream",
        "quick": False,
        "bound": {"share": 0.05, "cap": 0.012, "value": 0.0119},
        "gates": [gate("4"), gate("8")],
        "basis": {
            "resid_post 2": {
                "identity_r2": 0.651,
                "procrustes_r2": 0.733,
                "affine_r2": 0.791,
                "n_fit": 29_999,
                "n_test": 38_211,
            }
        },
        "tested": True,
        "firings": firings,
        "target_tokens": {"ids": [77, 912], "tokens": [" sip", " deep"], "coverage": 0.7831},
        "primary_dose": 1.0,
        "gap": {"single": estimate(0.2431, 0.0173, 1187), "joint": estimate(0.2519, 0.0164, 4291)},
        "baseline": {"single": before, "joint": before},
        "group": group(0.0007),
        "variants": [variant(*kind, seed, sampled=sampled) for seed, kind in enumerate(kinds)],
    }


def untested(feature: int) -> dict:
    record = study(feature)
    kept = {
        key: record[key]
        for key in (
            "schema",
            "provenance",
            "dictionary",
            "dictionary_sha256",
            "feature",
            "direction",
            "plan",
            "note",
            "pair",
            "quick",
        )
    }
    firings = {"onsets": 3, "of_onsets": 4291, "tasks": 2} | COUNTED
    firings |= {"s": None, "s_from": "0 active rows of the tune split", "s_share_of_resid_norm": None}
    return {
        **kept,
        "verdict": "INVALID",
        "tested": False,
        "reason": f"feature {feature} fires at 3 onsets of 2 tasks; a test needs 50 of 30",
        "firings": firings,
    }


def layers(pair: str = "small") -> dict:
    curves = []
    for model, end in (("standard", 0.031), ("adhd", 0.274)):
        for rendering, factor in (("standard", 0.31), ("adhd", 1.0)):
            means = [factor * end * 0.11 ** (5 - layer) for layer in range(6)]
            rows = [{"layer": i, **around(mean), **parts(mean)} for i, mean in enumerate(means)]
            ceiling = around(0.3017 * factor)
            curve = {"model": model, "rendering": rendering, "n": 4017, "tasks": 149, "layers": rows}
            curves.append(curve | {"ceiling": ceiling})
    maps = [{"layer": i, "r2": 0.6123 + i / 20, "identity_r2": -0.4 + i / 4, "fit_rows": 26_011, "held_out_rows": 7_013}
            for i in range(5)]  # fmt: skip
    return {
        "provenance": origin(pair=PAIR, cache=CACHE),
        "pair": pair,
        "target_tokens": {"ids": [77, 912], "tokens": [" sip", " deep"], "coverage": 0.7831},
        "curves": curves,
        "tuned_lens": {"standard": maps, "adhd": maps},
        "patching": patching(),
    }


def around(mean: float) -> dict:
    return {"mean": mean, "low": 0.83 * mean, "high": 1.21 * mean}


def parts(mean: float) -> dict:
    shares = {"tuned": 0.9, "attention": 0.21, "mlp": 0.34, "jump": 0.55}
    return {name: around(share * mean) for name, share in shares.items()} | {"ratio": around(2.31)}


def patching() -> dict:
    rows = []
    for layer in range(6):
        for giver, receiver in (("adhd", "standard"), ("standard", "adhd")):
            for flavour, factor in (("raw", 1.0), ("rotated", 0.9), ("affine", 0.7)):
                share = factor * layer / 6
                ends = {"share_low": share - 0.0312, "share_high": share + 0.0413 if layer else None}
                rows.append({"layer": layer, "giver": giver, "receiver": receiver, "flavour": flavour, "share": share,
                             **ends, "change": 0.2417 * share})  # fmt: skip
    summary = "the behaviour can be moved after blocks 1, 2, 3, 4, 5"
    return {"onsets": 811, "tasks": 57, "movable": [1, 2, 3, 4, 5], "summary": summary, "patched": rows}


def heads() -> dict:
    """Six heads in each model, two of them swapped."""
    random = np.random.default_rng(3)
    names = [f"L{layer}H{head}" for layer in range(2) for head in range(3)]
    targets = [names[i] for i in (0, 1, 2, 5, 4, 3)]
    centred = random.uniform(-0.5, 0.5, (6, 6)).round(4)
    value = {"value": 0.9713, "low": 0.9511, "high": 0.9831}
    matches = [
        {"pair": {"reference": own, "target": other, "raw": value, "centred": value}, "stability": 0.873,
         "p_prompts": 0.001, "p_layer": 0.0667}
        for own, other in zip(names, targets, strict=True)
    ]  # fmt: skip
    effects = [
        {"head": name, "way": way, "change": {"value": change, "low": change - 0.031, "high": change + 0.027},
         "median_change": change, "per_seed": [change] * 6, "p_heads": 0.5, "mean_steps": 14.31}
        for way in ("zero", "mean")
        for name, change in zip(names, random.uniform(-0.06, 0.02, 6).round(4).tolist(), strict=True)
    ]  # fmt: skip
    return {
        "provenance": origin(pair=PAIR, cache=CACHE),
        "pair": "small",
        "reference": "standard",
        "target": "adhd",
        "texts": 291,
        "tasks": 143,
        "summary": "the step-layout-broadcast head is L1H0 in standard and L1H2 in adhd",
        "matched_raw": 0.9517, "matched_centred": 0.9012, "same_index_raw": 0.6613, "same_index_centred": 0.1311,
        "in_place": 4, "in_layer": 6,
        "broadcast": {"reference": "L1H0", "target": "L1H2"},
        "matches": matches,
        "centred": centred.tolist(),
        "ablations": {
            "model": "adhd",
            "baseline": {"value": 0.8312, "low": 0.7811, "high": 0.8713},
            "effects": effects,
        },
    }  # fmt: skip


VARIANTS = (
    ("inject", "standard", 1),
    ("subtract", "adhd", -1),
    ("zero_ablate", "adhd", -1),
    ("upstream", "standard", 1),
)


def atlas() -> tuple[dict, dict[str, np.ndarray]]:
    """An atlas of the made-up scan's specific features: its record and its table."""
    features, random = feature_table(), np.random.default_rng(3)
    alive, tested = np.flatnonzero(features["alive"]), np.flatnonzero(features["specific"])[:30]
    tags, rows, columns, variants = ("beyond", "opposite", "common", "inside", "open", "rare"), [], [], []
    for name, model, sign in VARIANTS:
        slopes = random.normal(0, 0.0007, len(features["feature"]))
        slopes[tested] += sign * random.gamma(1, 0.004, len(tested))
        named = {int(feature): tags[number % 6 if number < 12 else 3] for number, feature in enumerate(tested)}
        for feature, told in named.items():
            mean = 1.07 * float(slopes[feature])
            known = {"feature": feature, "variant": name, "log_odds": float(features["log_odds"][feature])}
            known |= {"size": 0.731, "firings": 171, "mean": mean, "low": mean - 3e-4, "high": mean + 4e-4}
            known |= {"low_90": mean - 2e-4, "high_90": mean + 3e-4, "estimate": float(slopes[feature])}
            known |= {"ranked_mean": 0.00041, "null_low": -0.00213, "null_high": 0.00197, "tag": told}
            p = None if told == "rare" else float(random.random())
            rows.append(known | {"p": p, "q": p, "p_beyond": p, "q_beyond": p})
        mine = {row["feature"]: row for row in rows if row["variant"] == name}
        column = {"feature": alive, "variant": np.full(len(alive), name), "log_odds": features["log_odds"][alive]}
        column |= {"tested": np.isin(alive, tested), "estimate": slopes[alive]}
        for key in ("mean", "low", "high", "q"):
            column[key] = np.array([mine.get(feature, {}).get(key) for feature in alive.tolist()], dtype=float)
        columns.append(column | {"tag": np.array([named.get(feature, "") for feature in alive.tolist()])})
        variants.append(
            {
                "variant": name,
                "model": model,
                "predicted_sign": sign,
                "direction": "transported" if sign > 0 else "raw",
                "baseline": 0.2317,
                "null": {"low": -0.00219, "high": 0.00203, "draws": 9_999},
                "ranked_onsets": 64,
                "estimate": {"n": 30, "correlation": 0.9871, "median_relative_error": 0.0673},
                "tags": {told: sum(row["tag"] == told for row in mine.values()) for told in tags},
                "discoveries": 11,
            }
        )
    origin_ = origin(pair=PAIR, cache=CACHE, dictionary=DICTIONARY)
    record = {
        "provenance": origin_ | {"settings": {"max_q": 0.05}},
        "pair": "small",
        "target": "adhd",
        "reference": "standard",
        "target_tokens": {"ids": [77, 912], "tokens": [" sip", " deep"], "coverage": 0.7831},
        "alive": len(alive),
        "tested": len(tested),
        "silent": [211],
        "n": 1187,
        "tasks": 143,
        "gap": estimate(0.2431, 0.0173, 1187),
        "bound": {"share": 0.05, "cap": 0.012, "value": 0.0119},
        "variants": variants,
        "features": rows,
    }
    return record, {key: np.concatenate([column[key] for column in columns]) for key in columns[0]}


def write_atlas(run: Path) -> None:
    """The atlas beside a run's other records."""
    record, table = atlas()
    write_json(run / "intervene" / "atlas" / "atlas.json", record)
    write_table(run / "intervene" / "atlas" / "atlas.parquet", table)


def write_run(run: Path) -> Path:
    """A whole run: one dictionary, a scan, one tested and one untested feature, layers."""
    table = feature_table()
    write_json(run / "saes" / "adhd_L2_hook_resid_post" / "training.json", training())
    write_json(run / "scan" / "feature_diff.json", scan(table))
    write_table(run / "scan" / "features.parquet", table)
    write_json(run / "intervene" / "feature-7" / "results.json", study(7))
    write_json(run / "intervene" / "feature-25" / "results.json", untested(25))
    write_atlas(run)
    write_json(run / "layers" / "layers.json", layers())
    write_json(run / "heads" / "heads.json", heads())
    return run
