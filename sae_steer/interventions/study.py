"""A feature's causal effect on the target behaviour, under four interventions.

1. Onsets of confirm-split texts in the target's rendering; the same ones for all variants.
2. s, the size of dose 1: the median norm of the feature's contribution where it is active, on the tune split.
3. Each variant edits its model at each onset alone (single), and at all onsets of a text together (joint),
   at every dose; the measure is the exact probability of the target tokens there, before and after.
4. Effects in points of probability and as a share of the gap between the models, with intervals that resample
   tasks; isotropic directions of the same delivered length show what any vector of that size would do.
5. The card's own measure: the regulation rate of sampled plans at dose 1, against the A/A null.

The verdict on such evidence is not drawn here yet: `verdict` is None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sae_steer.cache import ActivationCache, site
from sae_steer.dictionary import Dictionary, check_fits
from sae_steer.errors import InputError
from sae_steer.interventions.bench import MODES, Bench, VariantReading, choose_onsets, estimates
from sae_steer.interventions.firings import count_firings, why_untested
from sae_steer.interventions.sampled import SampledArms, plan_titles
from sae_steer.interventions.variants import FeatureEdit, Variant, four_variants
from sae_steer.pair.model_pair import ModelPair
from sae_steer.records import provenance, read_json, read_table, write_json, write_table
from sae_steer.runtime import Progress, silent
from sae_steer.settings import InterveneSettings

RECORD_FILE, TRIALS_FILE = "results.json", "trials.parquet"


@dataclass(frozen=True)
class Study:
    """The record of one feature's interventions and the trials it rests on."""

    record: dict
    trials: Mapping[str, np.ndarray]

    @property
    def verdict(self) -> str | None:
        """None: this version measures and does not judge."""
        return self.record["verdict"]

    @property
    def tested(self) -> bool:
        """Whether the feature fired often enough to be tested."""
        return self.record["tested"]

    def table(self) -> str:
        """What was measured at the primary dose: exact effects of each variant, then the sampled plans."""
        if not self.tested:
            return self.record["reason"]
        firings, gap = self.record["firings"], self.record["gap"]
        lines = [
            f"fires at {firings['onsets']} of {firings['of_onsets']} onsets, of {firings['tasks']} tasks; dose 1 adds "
            f"or takes {firings['s']:.3g}, {firings['s_share_of_resid_norm']:.1%} of the median residual norm "
            f"({firings['s_from']})",
            f"target tokens begin {self.record['target_tokens']['coverage']:.1%} of the target steps; the models "
            f"differ by {_points(gap['single'])} points at the onsets edited singly, {_points(gap['joint'])} jointly",
            f"{'variant':<12} {'model':<10} {'single, points':>24} {'joint, points':>24} {'of the gap':>11} "
            f"{'random, points':>18}",
        ]
        lines += [self._exact(variant) for variant in self.record["variants"]]
        return "\n".join([*lines, *self._sampled()])

    def _exact(self, variant: Mapping) -> str:
        single, joint = (self._primary(variant[mode]) for mode in MODES)
        bounded = single["share_low"] is not None and single["share_high"] is not None
        share = f"{100 * single['share']:+.1f} %" if bounded else "n/a"
        controls = f"[{100 * variant['controls']['low']:+.2f}, {100 * variant['controls']['high']:+.2f}]"
        line = (
            f"{variant['variant']:<12} {variant['model']:<10} {_points(single):>24} {_points(joint):>24} {share:>11} "
            f"{controls:>18}"
        )
        if single["coverage"] == 1:
            return line
        return f"{line}  {100 * single['mean_where_edited']:+.2f} at the {single['coverage']:.0%} where it fires"

    def _sampled(self) -> list[str]:
        return [
            f"{variant['variant']:<12} {variant['model']:<10} in sampled plans {100 * strict['delta']:+.1f} points, "
            f"unedited against unedited [{100 * strict['null_low']:+.1f}, {100 * strict['null_high']:+.1f}]"
            for variant in self.record["variants"]
            if variant["sampled"] and (strict := variant["sampled"]["strict"])
        ]

    def _primary(self, effects: Mapping) -> Mapping:
        return next(row for row in effects["doses"] if row["dose"] == self.record["primary_dose"])

    def save(self, folder: Path) -> Path:
        """Write `trials.parquet` and `results.json`; returns the latter.

        The record is removed first and written last, so a folder that has one is whole.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RECORD_FILE, TRIALS_FILE):
            (folder / name).unlink(missing_ok=True)
        if self.tested:
            write_table(folder / TRIALS_FILE, self.trials)
        return write_json(folder / RECORD_FILE, self.record)


def load_study(folder: Path) -> Study:
    """A study `Study.save` wrote."""
    record = read_json(Path(folder) / RECORD_FILE)
    return Study(record, read_table(Path(folder) / TRIALS_FILE) if record["tested"] else {})


def study_provenance(
    pair: ModelPair, cache: ActivationCache, dictionary: Dictionary, feature: int, settings: InterveneSettings
) -> dict:
    """What fixes a study's result."""
    inputs = {"pair": pair.sha256, "cache": cache.sha256, "dictionary": dictionary.sha256, "feature": str(feature)}
    return provenance(settings=settings, inputs=inputs)


def intervene(
    pair: ModelPair,
    dictionary: Dictionary,
    *,
    feature: int,
    cache: ActivationCache,
    settings: InterveneSettings | None = None,
    on_step: Progress = silent,
) -> Study:
    """Measure what `feature` does to the probability of target tokens, by all four interventions."""
    settings = settings or InterveneSettings()
    _check(pair, cache, dictionary, settings)
    dictionary.sae.direction(feature)  # an index outside the dictionary ends here
    texts = cache.own_texts("confirm", pair.target.name)[: settings.prompts]
    onsets = choose_onsets(texts, settings)
    firings = count_firings(cache, dictionary, feature, onsets["joint"], onsets["single"], settings)
    record = {
        "provenance": study_provenance(pair, cache, dictionary, feature, settings),
        "dictionary": dictionary.name,
        "dictionary_sha256": dictionary.sha256,
        "feature": feature,
        "note": f"an index belongs to its dictionary: feature {feature} of this one is not feature {feature} of any "
        "other, nor of the released InterpGPT dictionaries",
        "pair": pair.name,
        "verdict": None,
    }
    reason = why_untested(firings, feature, dictionary, settings)
    if reason:
        return Study({**record, "tested": False, "reason": reason, "firings": firings}, {})
    tokens = cache.target_tokens(pair)
    edit = FeatureEdit(dictionary.sae, feature, firings["s"])
    bench = Bench(pair, dictionary.layer, edit, tokens.ids, onsets, settings)
    arms = SampledArms(pair, dictionary.layer, edit, plan_titles(pair, texts[: settings.generations]), settings)
    variants = four_variants(settings.upstream)
    readings, sampled, stages = [], [], 2 * len(variants)
    for number, variant in enumerate(variants):
        on_step(number, stages, f"{variant.name}: exact effects")
        readings.append(bench.read(variant))
    for number, variant in enumerate(variants):
        on_step(len(variants) + number, stages, f"{variant.name}: sampled plans")
        sampled.append(arms.read(variant, 1 + number))
    on_step(stages, stages, "measured")
    measured = {
        "tested": True,
        "firings": firings,
        "target_tokens": tokens.described(pair.tokenizer),
        **_measured(bench, variants, readings, sampled),
    }
    return Study({**record, **measured}, bench.trials(variants, readings))


def _check(pair: ModelPair, cache: ActivationCache, dictionary: Dictionary, settings: InterveneSettings) -> None:
    cache.check_pair(pair)
    check_fits(dictionary, cache)
    if dictionary.model != pair.target.name:
        raise InputError(
            f"the dictionary {dictionary.name} is of model '{dictionary.model}'; interventions take one of the target "
            f"model '{pair.target.name}'"
        )
    if not 0 < settings.upstream <= dictionary.layer:
        raise InputError(
            f"cannot inject {settings.upstream} layers upstream of layer {dictionary.layer}; set upstream to 1 or "
            "more, and take a dictionary of a layer that has as many below it"
        )
    if settings.primary_dose not in settings.doses:
        raise InputError(f"the primary dose {settings.primary_dose} is not among the doses {settings.doses}; add it")


def _measured(
    bench: Bench, variants: Sequence[Variant], readings: Sequence[VariantReading], sampled: Sequence[dict | None]
) -> dict:
    """The part of the record that the readings fill."""
    gap = _gap(variants, readings)
    return {
        "primary_dose": bench.settings.primary_dose,
        "gap": {mode: estimates(gap[mode][:, None], bench.onsets[mode], bench.settings)[0] for mode in MODES},
        "baseline": {
            mode: {v.name: float(r.base(mode).mean()) for v, r in zip(variants, readings, strict=True)}
            for mode in MODES
        },
        "variants": [
            {
                "variant": variant.name,
                "model": variant.model(bench.pair).name,
                "site": site(bench.layer - variant.layers_below),
                "predicted_sign": variant.predicted_sign,
                **{mode: bench.effects(reading, mode, gap[mode]) for mode in MODES},
                "controls": bench.controls(reading),
                "sampled": arm,
            }
            for variant, reading, arm in zip(variants, readings, sampled, strict=True)
        ],
    }


def _gap(variants: Sequence[Variant], readings: Sequence[VariantReading]) -> dict[str, Float[np.ndarray, " row"]]:
    """Target mass of the target model minus that of the reference model, at the same onsets."""
    target = next(r for v, r in zip(variants, readings, strict=True) if v.edits_target)
    reference = next(r for v, r in zip(variants, readings, strict=True) if not v.edits_target)
    return {mode: target.base(mode) - reference.base(mode) for mode in MODES}


def _points(row: Mapping) -> str:
    """A mean and its interval in points of probability."""
    return f"{100 * row['mean']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]"
