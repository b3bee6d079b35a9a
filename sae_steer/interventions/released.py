"""A study in the released InterpGPT files' names and keys, as far as they are known; what it cannot fill is null.

`three_probes.json` has the released keys. Of `deepdive_steering.json` only the content is known: the four panels of
one feature, each with its sampled rates and the null they are compared with.
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
    """The released keys; probe 1 is the scan's to fill, and the all-positions ablation needs `--positions all`."""
    variants = {variant["variant"]: variant for variant in record.get("variants", ())}
    ablated, upstream = (_sampled(variants.get(name)) for name in ("zero_ablate", "upstream"))
    return {
        "provenance": record["provenance"],
        "probe_1_variant_split": None,
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
