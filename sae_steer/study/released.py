"""A study in the released InterpGPT files' names and keys, as far as they are known; what it cannot fill is null.

`three_probes.json` has the released keys; its features are counted at the confirm texts' onsets. Of
`deepdive_steering.json` only the content is known: the four panels of one feature, each with its sampled rates and
the null they are compared with.
"""

from sae_steer.edits.variants import variant_named
from sae_steer.effects.firings import Firings
from sae_steer.study.record import Study, VariantResult


def deepdive_steering(study: Study) -> dict:
    """The panels of a study: sampled rates at dose 1, the A/A null beside them, and the verdict."""
    return {
        "provenance": study.provenance,
        "feature": study.feature,
        "direction": study.direction,
        "verdict": study.verdict,
        "panels": {_panel_name(variant.name): _panel(variant) for variant in study.variants},
    }


def three_probes(study: Study) -> dict:
    """The released keys.

    Probe 1 counts one feature at the same onsets of target-variant text in both models. The released feature is 2504;
    under its keys stands the one named by `feature`. Null: what would take onsets of reference-variant text, and the
    all-positions ablation, which needs `--positions all`.
    """
    firings, sampled = study.firings, {variant.name: variant.sampled for variant in study.variants}
    ablated, upstream = sampled.get("zero_ablate"), sampled.get("upstream")
    dose = study.evidence.primary_dose if study.evidence else 1.0
    return {
        "provenance": study.provenance,
        "feature": study.feature,
        "probe_1_variant_split": {
            "onsets_all": None,
            "onsets_adhd": firings and firings.of_onsets,
            "onsets_std": None,
            "primary_mixed": None,
            "symmetry_mixed": None,
            "primary_adhd_only": study.specific_features,
            "symmetry_std_only": None,
            "feat2504_rate_adhd_only_in_adhd_L2": firings and _share(firings, firings.onsets),
            "feat2504_rate_adhd_only_in_std_L2": firings and _share(firings, firings.reference_onsets),
        },
        "probe_2_zero_ablation": {
            "adhd_baseline_reg_rate": ablated and ablated.strict.baseline_rate,
            "adhd_zero_ablate_L2_step_onset_reg_rate": ablated and ablated.strict.rate,
            "adhd_zero_ablate_L2_all_positions_reg_rate": None,
            "delta_step_onset": ablated and ablated.strict.delta,
            "delta_all_positions": None,
        },
        "probe_3_L1_steering": {
            "baseline": upstream and {"regulation_rate": upstream.strict.baseline_rate},
            f"coef_+{dose:.1f}": upstream
            and {
                "regulation_rate": upstream.strict.rate,
                "mean_step_count": upstream.mean_step_count,
                "n_steps_total": upstream.steps,
                "sep_rate": None,
                "spearman_rho": None,
                "spearman_pval": None,
                "n_tokens_total": None,
                "reached_end_rate": None,
            },
        },
    }


def _panel_name(variant: str) -> str:
    kind = variant_named(variant)
    return kind.released if kind else variant


def _share(firings: Firings, onsets: int | None) -> float | None:
    """Of the onsets counted."""
    return None if onsets is None else onsets / firings.of_onsets


def _panel(variant: VariantResult) -> dict:
    strict = variant.sampled and variant.sampled.strict
    return {
        "model": variant.model,
        "site": variant.site,
        "direction": variant.flavour,
        "verdict": variant.verdict,
        "baseline_reg_rate": strict and strict.baseline_rate,
        "steered_reg_rate": strict and strict.rate,
        "delta": strict and strict.delta,
        "null_sd": strict and strict.null_sd,
        "p": strict and strict.p,
    }
