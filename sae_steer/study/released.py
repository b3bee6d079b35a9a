"""A study in the released InterpGPT files' names and keys, as far as they are known; what it cannot fill is null.

`three_probes.json` has the released keys; its features are counted at the confirm texts' onsets. Of
`deepdive_steering.json` only the content is known: the four panels of one feature, each with its sampled rates and
the null they are compared with.
"""

from collections.abc import Mapping

PANELS = {
    "inject": "inject_into_reference",
    "subtract": "subtract_from_target",
    "zero_ablate": "zero_ablate_in_target",
    "upstream": "inject_upstream",
}


def deepdive_steering(record: Mapping) -> dict:
    """The panels of a study: sampled rates at dose 1, the A/A null beside them, and the verdict."""
    return {
        "provenance": record["provenance"],
        "feature": record["feature"],
        "direction": record["direction"],
        "verdict": record["verdict"],
        "panels": {PANELS[variant["variant"]]: _panel(variant) for variant in record.get("variants", ())},
    }


def three_probes(record: Mapping) -> dict:
    """The released keys.

    Probe 1 counts one feature at the same onsets of target-variant text in both models. The released feature is 2504;
    under its keys stands the one named by `feature`. Null: what would take onsets of reference-variant text, and the
    all-positions ablation, which needs `--positions all`.
    """
    firings = record.get("firings") or {}
    variants = {variant["variant"]: variant for variant in record.get("variants", ())}
    ablated, upstream = (_sampled(variants.get(name)) for name in ("zero_ablate", "upstream"))
    return {
        "provenance": record["provenance"],
        "feature": record["feature"],
        "probe_1_variant_split": {
            "onsets_all": None,
            "onsets_adhd": firings.get("of_onsets"),
            "onsets_std": None,
            "primary_mixed": None,
            "symmetry_mixed": None,
            "primary_adhd_only": record["specific_features"],
            "symmetry_std_only": None,
            "feat2504_rate_adhd_only_in_adhd_L2": _share(firings, "onsets"),
            "feat2504_rate_adhd_only_in_std_L2": _share(firings, "reference_onsets"),
        },
        "probe_2_zero_ablation": {
            "adhd_baseline_reg_rate": ablated and ablated["strict"]["baseline_rate"],
            "adhd_zero_ablate_L2_step_onset_reg_rate": ablated and ablated["strict"]["rate"],
            "adhd_zero_ablate_L2_all_positions_reg_rate": None,
            "delta_step_onset": ablated and ablated["strict"]["delta"],
            "delta_all_positions": None,
        },
        "probe_3_L1_steering": {
            "baseline": upstream and {"regulation_rate": upstream["strict"]["baseline_rate"]},
            f"coef_+{record.get('primary_dose', 1.0):.1f}": upstream
            and {
                "regulation_rate": upstream["strict"]["rate"],
                "mean_step_count": upstream["mean_step_count"],
                "n_steps_total": upstream["steps"],
                "sep_rate": None,
                "spearman_rho": None,
                "spearman_pval": None,
                "n_tokens_total": None,
                "reached_end_rate": None,
            },
        },
    }


def _share(firings: Mapping, of: str) -> float | None:
    """Of the onsets counted."""
    return None if firings.get(of) is None else firings[of] / firings["of_onsets"]


def _panel(variant: Mapping) -> dict:
    strict = (_sampled(variant) or {}).get("strict")
    return {
        "model": variant["model"],
        "site": variant["site"],
        "direction": variant["direction"],
        "verdict": variant["verdict"],
        "baseline_reg_rate": strict and strict["baseline_rate"],
        "steered_reg_rate": strict and strict["rate"],
        "delta": strict and strict["delta"],
        "null_sd": strict and strict["null_sd"],
        "p": strict and strict["p"],
    }


def _sampled(variant: Mapping | None) -> Mapping | None:
    return None if variant is None else variant.get("sampled")
