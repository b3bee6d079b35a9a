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

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sae_steer import stats
from sae_steer.cache import ActivationCache, site
from sae_steer.corpus import TargetTokens, parse_plan
from sae_steer.dictionary import Dictionary, check_fits
from sae_steer.errors import InputError, SteerError
from sae_steer.interventions.edits import Control, isotropic
from sae_steer.interventions.measure import OnsetRows, Reading, check_delivered, read, unedited
from sae_steer.interventions.sampled import Baseline, sample_baseline, sampled_arm
from sae_steer.interventions.variants import FeatureEdit, Variant, four_variants
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text
from sae_steer.records import provenance, read_json, read_table, write_json, write_table
from sae_steer.runtime import Progress, generator, silent
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
        """Each variant's effect at the primary dose, in points of probability, single and joint."""
        if not self.tested:
            return self.record["reason"]
        dose = self.record["primary_dose"]
        lines = [f"{'variant':<12} {'model':<10} {'single, points':>24} {'joint, points':>24} {'of the gap':>11}"]
        for variant in self.record["variants"]:
            cells = []
            for mode in ("single", "joint"):
                at = next(row for row in variant[mode]["doses"] if row["dose"] == dose)
                cells.append(f"{100 * at['mean']:+.2f} [{100 * at['low']:+.2f}, {100 * at['high']:+.2f}]")
            share = "n/a" if at["share"] is None else f"{100 * at['share']:+.1f} %"
            lines.append(f"{variant['variant']:<12} {variant['model']:<10} {cells[0]:>24} {cells[1]:>24} {share:>11}")
        return "\n".join(lines)

    def save(self, folder: Path) -> Path:
        """Write `trials.parquet`, then `results.json`; returns the latter."""
        if self.trials:
            write_table(Path(folder) / TRIALS_FILE, self.trials)
        return write_json(Path(folder) / RECORD_FILE, self.record)


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
    head = {
        "provenance": study_provenance(pair, cache, dictionary, feature, settings),
        "dictionary": dictionary.name,
        "dictionary_sha256": dictionary.sha256,
        "feature": feature,
        "note": f"an index belongs to its dictionary: feature {feature} of this one is not feature {feature} of any other, "
        "nor of the released InterpGPT dictionaries",
        "pair": pair.name,
        "verdict": None,
    }
    firings = _firings(cache, dictionary, feature, texts, settings)
    if firings["onsets"] < settings.min_firings or firings["tasks"] < settings.min_tasks or firings["s"] is None:
        reason = (
            f"feature {feature} of {dictionary.name} fires at {firings['onsets']} onsets of {firings['tasks']} tasks in the "
            f"confirm texts; a test needs {settings.min_firings} of {settings.min_tasks}"
        )
        return Study({**head, "tested": False, "reason": reason, "firings": firings}, {})
    tokens = cache.target_tokens(pair)
    edit = FeatureEdit(dictionary.sae, feature, firings["s"])
    bench = Bench(pair, dictionary.layer, edit, tokens, _choose_onsets(texts, settings), settings)
    variants = four_variants(settings.upstream)
    readings = []
    for number, variant in enumerate(variants):
        on_step(number, 2 * len(variants), f"{variant.name}: exact effects")
        readings.append(bench.read(variant))
    sampled = _sampled(pair, dictionary.layer, edit, texts, settings, on_step)
    gap = _gap(variants, readings)
    record = {
        **head,
        "tested": True,
        "firings": firings,
        "target_tokens": {
            "ids": list(tokens.ids),
            "tokens": [pair.tokenizer.decode([token]) for token in tokens.ids],
            "coverage": tokens.coverage,
        },
        "primary_dose": settings.primary_dose,
        "gap": {mode: _estimates(gap[mode][:, None], bench.rows(mode), settings)[0] for mode in gap},
        "baseline": {mode: _baselines(variants, readings, mode) for mode in gap},
        "variants": [
            {
                "variant": variant.name,
                "model": variant.model(pair).name,
                "site": site(dictionary.layer - variant.layers_below),
                "predicted_sign": variant.predicted_sign,
                **{mode: bench.effects(reading, mode, gap[mode]) for mode in gap},
                "controls": reading.controls,
                "sampled": sampled.get(variant.name),
            }
            for variant, reading in zip(variants, readings, strict=True)
        ],
    }
    return Study(record, bench.trials(variants, readings))


@dataclass(frozen=True)
class VariantReading:
    """One variant's readings: column 0 of the masses is the unedited baseline, then the doses."""

    single: Reading
    joint: Reading
    controls: dict

    def base(self, mode: str) -> Float[np.ndarray, " row"]:
        """Unedited target mass."""
        return getattr(self, mode).mass[:, 0]

    def effect(self, mode: str) -> Float[np.ndarray, "row dose"]:
        """Change of target mass at each dose."""
        mass = getattr(self, mode).mass
        return mass[:, 1:] - mass[:, :1]


@dataclass(frozen=True)
class Bench:
    """All that a reading needs besides the variant."""

    pair: ModelPair
    layer: int
    edit: FeatureEdit
    tokens: TargetTokens
    onsets: dict[str, OnsetRows]
    settings: InterveneSettings

    def rows(self, mode: str) -> OnsetRows:
        """The onsets a mode reads."""
        return self.onsets[mode]

    def read(self, variant: Variant) -> VariantReading:
        """The variant at every dose, in both modes, and its control directions at the primary dose."""
        model, layer, doses = variant.model(self.pair).decoder, self.layer - variant.layers_below, self.settings.doses
        edits = [unedited, *(self.edit.of(variant, dose) for dose in doses)]
        found = {
            mode: read(model, layer, self.onsets[mode], edits, self.tokens.ids, joint=mode == "joint")
            for mode in self.onsets
        }
        for mode, reading in found.items():
            nonzero = [column for column, dose in enumerate(doses, 1) if dose]
            taken = Reading(reading.mass[:, nonzero], reading.delivered[:, nonzero])
            check_delivered(taken, [f"{variant.name} at dose {doses[column - 1]} ({mode})" for column in nonzero])
            if 0 in doses and not np.array_equal(reading.mass[:, 0], reading.mass[:, 1 + doses.index(0)]):
                raise SteerError(
                    f"{variant.name} at dose 0 differs from the baseline; the measurement cannot be trusted"
                )
        return VariantReading(found["single"], found["joint"], self._controls(variant, model, layer, found["single"]))

    def _controls(self, variant: Variant, model, layer: int, reading: Reading) -> dict:
        """Mean effects of isotropic directions, moved as far as the feature's edit, and the feature's rank among them."""
        settings = self.settings
        primary = self.edit.of(variant, settings.primary_dose)
        directions = isotropic(settings.controls, len(self.edit.unit), generator(settings.seed, 31))
        edits = [Control(primary, direction) for direction in directions]
        mass = read(model, layer, self.onsets["single"], edits, self.tokens.ids).mass
        means = (mass - reading.mass[:, :1]).mean(axis=0)
        column = 1 + settings.doses.index(settings.primary_dose)
        observed = float((reading.mass[:, column] - reading.mass[:, 0]).mean())
        low, high = np.quantile(means, [0.025, 0.975])
        return {
            "family": "isotropic",
            "count": len(means),
            "low": float(low),
            "high": float(high),
            "rank_p": stats.rank_p(observed, means),
            "means": means.tolist(),
        }

    def effects(self, reading: VariantReading, mode: str, gap: Float[np.ndarray, " row"]) -> dict:
        """The dose curve: points and share of the gap with intervals, and the length delivered."""
        onsets, delivered = self.onsets[mode], getattr(reading, mode).delivered[:, 1:]
        rows = _estimates(reading.effect(mode), onsets, self.settings, gap)
        for row, dose, moved in zip(rows, self.settings.doses, delivered.T, strict=True):
            row |= {"dose": dose, "mean_delivered_norm": float(moved.mean()), "rows_edited": int((moved > 0).sum())}
        return {"n": len(onsets), "tasks": len(np.unique(onsets.task)), "doses": rows}

    def trials(self, variants: tuple[Variant, ...], readings: list[VariantReading]) -> dict[str, np.ndarray]:
        """One row an onset x variant x dose x mode."""
        parts: list[dict[str, np.ndarray]] = []
        for variant, found in zip(variants, readings, strict=True):
            for mode, onsets in self.onsets.items():
                reading = getattr(found, mode)
                for column, dose in enumerate(self.settings.doses, 1):
                    parts.append(
                        {
                            "variant": np.full(len(onsets), variant.name),
                            "mode": np.full(len(onsets), mode),
                            "dose": np.full(len(onsets), dose),
                            "prompt": onsets.prompt,
                            "task": onsets.task,
                            "position": onsets.position,
                            "next_is_target": onsets.is_target,
                            "p_base": reading.mass[:, 0],
                            "p_edited": reading.mass[:, column],
                            "delivered_norm": reading.delivered[:, column],
                        }
                    )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
            f"cannot inject {settings.upstream} layers below layer {dictionary.layer}; choose 1 to {dictionary.layer}"
        )
    if settings.primary_dose not in settings.doses:
        raise InputError(f"the primary dose {settings.primary_dose} is not among the doses {settings.doses}; add it")


def _firings(
    cache: ActivationCache, dictionary: Dictionary, feature: int, texts: list[Text], settings: InterveneSettings
) -> dict:
    """Onsets and tasks at which the feature fires in the confirm texts, and s from the tune split."""
    norm = float(dictionary.sae.direction(feature).norm())
    active, resid_norm, where = _tune_activations(cache, dictionary, feature, settings)
    wanted = {(text.prompt, text.variant) for text in texts}
    labels = cache.labels("confirm")
    chosen = labels["is_onset"].astype(bool)
    chosen &= np.array(
        [key in wanted for key in zip(labels["prompt"].tolist(), labels["text_variant"].tolist(), strict=True)]
    )
    rows = np.flatnonzero(chosen)
    resid = cache.rows(dictionary.model, dictionary.layer, "confirm").take(rows)
    fires = dictionary.sae.activation_of(resid, feature).numpy() > 0
    s = float(np.median(active) * norm) if len(active) else None
    return {
        "onsets": int(fires.sum()),
        "of_onsets": len(rows),
        "tasks": len(np.unique(labels["task"][rows][fires])),
        "s": s,
        "s_from": where,
        "s_share_of_resid_norm": s / resid_norm if s else None,
    }


def _tune_activations(
    cache: ActivationCache, dictionary: Dictionary, feature: int, settings: InterveneSettings
) -> tuple[Float[np.ndarray, " active"], float, str]:
    """The feature's values where it is active: at onsets, or anywhere if those are too few; median residual norm."""
    labels = cache.labels("tune")
    own = np.isin(labels["text_variant"], cache.own_variants(dictionary.model))
    resid = cache.rows(dictionary.model, dictionary.layer, "tune").take(np.flatnonzero(own))
    values = dictionary.sae.activation_of(resid, feature).numpy()
    at_onset = values[labels["is_onset"].astype(bool)[own]]
    norm = float(resid.norm(dim=1).median())
    if (at_onset > 0).sum() >= settings.min_firings:
        return at_onset[at_onset > 0], norm, f"{(at_onset > 0).sum()} active onsets of the tune split"
    return values[values > 0], norm, f"{(values > 0).sum()} active rows of the tune split, few of them onsets"


def _choose_onsets(texts: list[Text], settings: InterveneSettings) -> dict[str, OnsetRows]:
    """Up to `onsets_per_prompt` of each text for single edits, drawn by seed; all of them for joint ones."""
    random = np.random.default_rng([settings.seed, 5])
    every = [np.flatnonzero(text.is_onset) for text in texts]
    some = [np.sort(random.permutation(found)[: settings.onsets_per_prompt]) for found in every]
    return {"single": OnsetRows.of(texts, some), "joint": OnsetRows.of(texts, every)}


def _gap(variants: tuple[Variant, ...], readings: list[VariantReading]) -> dict[str, Float[np.ndarray, " row"]]:
    """Target mass of the target model minus that of the reference model, at the same onsets."""
    target = next(r for v, r in zip(variants, readings, strict=True) if v.edits_target)
    reference = next(r for v, r in zip(variants, readings, strict=True) if not v.edits_target)
    return {mode: target.base(mode) - reference.base(mode) for mode in ("single", "joint")}


def _baselines(variants: tuple[Variant, ...], readings: list[VariantReading], mode: str) -> dict[str, float]:
    return {v.name: float(r.base(mode).mean()) for v, r in zip(variants, readings, strict=True)}


def _estimates(
    effect: Float[np.ndarray, "row column"],
    onsets: OnsetRows,
    settings: InterveneSettings,
    gap: Float[np.ndarray, " row"] | None = None,
) -> list[dict]:
    """Per column: the onset-weighted mean with its interval, the prompt-weighted mean, the share of the gap."""
    draws = {"draws": settings.bootstrap_draws, "seed": settings.seed}
    points = stats.cluster_bootstrap(effect, onsets.task, **draws)
    _, prompt, count = np.unique(onsets.prompt, return_inverse=True, return_counts=True)
    by_prompt = np.average(effect, axis=0, weights=1 / count[prompt])
    rows = [
        {
            "mean": float(mean),
            "low": float(low),
            "high": float(high),
            "prompt_weighted": float(other),
            "n": points.n,
            "tasks": points.clusters,
        }
        for mean, low, high, other in zip(points.mean, points.low, points.high, by_prompt, strict=True)
    ]
    if gap is not None:
        share = stats.cluster_bootstrap_ratio(effect, gap[:, None], onsets.task, **draws)
        for row, *ends in zip(rows, share.mean, share.low, share.high, strict=True):
            row |= {key: _finite(value) for key, value in zip(("share", "share_low", "share_high"), ends, strict=True)}
    return rows


def _finite(value: float) -> float | None:
    """None for an unbounded end of an interval: JSON has no infinity."""
    return float(value) if np.isfinite(value) else None


def _sampled(
    pair: ModelPair, layer: int, edit: FeatureEdit, texts: list[Text], settings: InterveneSettings, on_step: Progress
) -> dict[str, dict]:
    """The sampled arm of each variant; empty for pairs whose texts are no plans."""
    plans = [parse_plan(pair.tokenizer.decode(text.token.tolist())) for text in texts[: settings.generations]]
    if pair.onsets.regex is not None or not all(plan.well_formed for plan in plans):
        return {}
    titles, variants = [plan.title for plan in plans], four_variants(settings.upstream)
    baselines: dict[str, Baseline] = {}
    found = {}
    for number, variant in enumerate(variants):
        model = variant.model(pair)
        on_step(len(variants) + number, 2 * len(variants), f"{variant.name}: sampled plans")
        if model.name not in baselines:
            baselines[model.name] = sample_baseline(pair, model, titles, settings)
        found[variant.name] = sampled_arm(
            pair, variant, layer, edit, titles, baselines[model.name], settings, arm=1 + number
        )
    return found
