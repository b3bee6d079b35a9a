"""A direction's causal effect on the target behaviour, under the interventions that can be made with it.

1. The plan is written: source, settings, measured tokens, the content of every split.
2. On train and tune texts: maps between the models' streams, the size of dose 1, control directions.
3. On confirm texts, onsets in the target's rendering, the same for all variants: `protocol.weigh`.
4. Beside it the card's own measure: the regulation rate of sampled plans at dose 1.

A feature that hardly fires is not tested: its verdict is INVALID, with the counts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from sae_steer.align import BasisCheck
from sae_steer.cache import ActivationCache
from sae_steer.corpus import TargetTokens
from sae_steer.dictionary import Dictionary, check_fits
from sae_steer.edits import directions
from sae_steer.edits.arms import Arm, Bench
from sae_steer.edits.basis import embedding_check
from sae_steer.edits.variants import Direction
from sae_steer.effects.firings import Firings, count_firings
from sae_steer.effects.group import Group, features_like, read_group
from sae_steer.effects.readings import Onsets
from sae_steer.effects.sampled import SampledArms, plan_prompts
from sae_steer.effects.splicing import ce_recovered
from sae_steer.effects.trace import Trace, direct_effect, trace
from sae_steer.errors import InputError
from sae_steer.files import sha256
from sae_steer.model.readout import TargetMass
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text
from sae_steer.progress import Progress, silent
from sae_steer.records import provenance
from sae_steer.settings import SPLITS, InterveneSettings
from sae_steer.study import gates
from sae_steer.study.gates import Gate
from sae_steer.study.plan import Plan, fix_plan
from sae_steer.study.protocol import check_settings, weigh
from sae_steer.study.record import PlanNote, Study, TokenSet, VariantResult
from sae_steer.study.verdict import INVALID

TRACE_TEXTS = 60
"""Confirm texts in which each arm's edit is followed through the blocks above."""
FIT_TEXTS = 300
"""Train texts on which the maps between the streams are fitted."""

Source = int | str | Path | Tensor
"""A feature's index, one of `directions.SOURCES`, a file with a vector, or a vector."""


def study_provenance(
    pair: ModelPair,
    cache: ActivationCache,
    dictionary: Dictionary,
    source: Source,
    settings: InterveneSettings,
    leave_out: Collection[int] | None = None,
) -> dict:
    """What fixes a study's result."""
    inputs = {
        "pair": pair.sha256,
        "cache": cache.sha256,
        "rows": cache.row_filter.identity,
        "dictionary": dictionary.sha256,
        "direction": _identity(source),
        "specific_features": "by the tune texts" if leave_out is None else sha256(repr(sorted(leave_out)).encode()),
    }
    return provenance(settings=settings, inputs=inputs)


def plan_study(pair: ModelPair, cache: ActivationCache, origin: Mapping, folder: Path, *, force: bool = False) -> Plan:
    """The plan of the study with this provenance, fixed in `folder` before its confirm texts are read."""
    shards = cache.manifest["shards"]
    splits = {split: sha256("/".join(s["sha256"] for s in shards if s["split"] == split).encode()) for split in SPLITS}
    wanted = {
        "direction": origin["inputs"]["direction"],
        "inputs": origin["inputs"],
        "settings": origin["settings"],
        "target_tokens": list(cache.target_tokens(pair).ids),
        "splits": splits,
    }
    return fix_plan(folder, wanted, force=force)


def intervene(
    pair: ModelPair,
    dictionary: Dictionary,
    *,
    feature: int | None = None,
    direction: str | Path | Tensor | None = None,
    cache: ActivationCache,
    settings: InterveneSettings | None = None,
    leave_out: Collection[int] | None = None,
    plan: Plan | None = None,
    on_step: Progress = silent,
) -> Study:
    """Measure and judge what a `feature` of the dictionary, or a `direction`, does to the probability of target tokens.

    Args:
        direction: `mean-difference`, `unembedding`, `random`, a .npy, .pt, .safetensors or .json file, or a vector
            of the target model's stream after the dictionary's layer.
        leave_out: the features of the scan that are specific to the target, which are no controls; by default
            those that are on the tune texts.
        plan: what was fixed before; its hash goes into the record.
    """
    settings = settings or InterveneSettings()
    check_inputs(pair, cache, dictionary, settings)
    dictionary = dictionary.to(pair.target.model.device)
    if (feature is None) == (direction is None):
        raise InputError("name either a feature or a direction, not both")
    source = feature if direction is None else direction
    if feature is not None:
        dictionary.sae.direction(feature)  # an index outside the dictionary ends here
    tokens = cache.target_tokens(pair)
    bench = bench_of(pair, dictionary, cache, tokens, settings)
    studied = find_direction(bench, dictionary, source)
    texts = cache.own_texts("confirm", pair.target.name)[: settings.prompts]
    known_gates, firings, reason = dictionary_gate(bench, dictionary, studied, texts, feature)
    facts = {
        "direction": _name(source),
        "quick": settings.quick,
        "feature": feature,
        "dictionary": dictionary.name,
        "dictionary_sha256": dictionary.sha256,
        "specific_features": None if leave_out is None else len(leave_out),
        "pair": pair.name,
        "note": _note(source),
        "target_tokens": TokenSet.of(tokens.described(pair.tokenizer)),
        "plan": plan and PlanNote.of(plan.record()),
        "provenance": study_provenance(pair, cache, dictionary, source, settings, leave_out),
        "firings": firings,
    }
    if reason or studied is None:
        return Study(**facts, verdict=INVALID, reason=reason)
    arms = bench.arms(studied, leave_out=leave_out)
    stages = 2 * len(arms)
    weighed = weigh(
        arms, texts, bench.measure, settings,
        known_gates=known_gates, on_step=lambda done, total, note="": on_step(done, stages, note),
    )  # fmt: skip
    variants = _sampled_and_traced(pair, bench, arms, weighed.evidence.variants, texts, on_step)
    group, trials = None, weighed.trials
    if feature is not None:
        group, group_trials = _with_its_like(bench, studied, texts)
        trials = {name: np.concatenate([column, group_trials[name]]) for name, column in trials.items()}
    on_step(stages, stages, "measured")
    left_out = bench.tuned.selection.left_out
    evidence = replace(weighed.evidence, variants=variants, basis=_basis(bench), rows_left_out=left_out, group=group)
    return Study(**facts, verdict=weighed.verdict, evidence=evidence, trials=trials, controls=weighed.controls)


def _sampled_and_traced(
    pair: ModelPair,
    bench: Bench,
    arms: Sequence[Arm],
    variants: Sequence[VariantResult],
    texts: Sequence[Text],
    on_step: Progress,
) -> tuple[VariantResult, ...]:
    """The variants with what sampled plans show, and with where the edit goes."""
    settings = bench.settings
    sampled = SampledArms(pair, plan_prompts(pair, texts[: settings.generations]), settings)
    followed = Onsets.of(texts[:TRACE_TEXTS], settings).single
    assert isinstance(bench.measure, TargetMass)
    whole = []
    for number, (arm, variant) in enumerate(zip(arms, variants, strict=True), len(arms)):
        on_step(number, 2 * len(arms), f"{variant.name}: sampled plans")
        reads = directions.unembedding(arm.model.model, bench.measure.ids)
        edited = arm.model.model, arm.layer, arm.edit(settings.primary_dose), followed
        direct = direct_effect(*edited, bench.measure, settings.resampling)
        whole.append(replace(variant, sampled=sampled.read(arm), trace=Trace(trace(*edited, reads), direct)))
    return tuple(whole)


def _with_its_like(bench: Bench, studied: Direction, texts: Sequence[Text]) -> tuple[Group, dict[str, np.ndarray]]:
    """What ablating a feature does together with those most like it, and the trials."""
    like = features_like(studied, *bench.sizing_rows)
    onsets = Onsets.of(texts, bench.settings)
    return read_group(bench.target.model, bench.layer, studied, like, onsets, bench.measure, bench.settings)


def find_direction(bench: Bench, dictionary: Dictionary, source: Source) -> Direction | None:
    """The direction a source names, with its size; None for a feature that is silent on the tune texts."""
    d_model = bench.target.model.shape.d_model
    if isinstance(source, int):
        return directions.feature_direction(dictionary.sae, source, *bench.sizing_rows)
    if source == "mean-difference":
        return bench.mean_difference
    if source == "unembedding":
        assert isinstance(bench.measure, TargetMass)
        vector = directions.unembedding(bench.target.model, bench.measure.ids)
        return directions.of_vector(source, vector, bench.mean_difference.s)
    if source == "random":
        vector = directions.random_direction(d_model, bench.settings.seed)
        return directions.of_vector(source, vector, bench.mean_difference.s)
    vector = source if isinstance(source, Tensor) else directions.read_vector(Path(source), d_model)
    if vector.numel() != d_model:
        raise InputError(f"the direction has {vector.numel()} numbers and the stream {d_model} dimensions")
    return directions.of_vector(_name(source), vector.reshape(d_model), None)


def bench_of(
    pair: ModelPair,
    dictionary: Dictionary,
    cache: ActivationCache,
    tokens: TargetTokens,
    settings: InterveneSettings,
) -> Bench:
    """The pair side by side at the dictionary's layer, on the cache's texts."""
    own = pair.target.name
    return Bench(
        reference=pair.reference,
        target=pair.target,
        layer=dictionary.layer,
        measure=TargetMass(tokens.ids),
        settings=settings,
        fit=cache.own_texts("train", own)[:FIT_TEXTS],
        tune=cache.own_texts("tune", own),
        dictionary=dictionary.sae,
        row_filter=cache.row_filter,
    )


def dictionary_gate(
    bench: Bench, dictionary: Dictionary, studied: Direction | None, texts: Sequence[Text], feature: int | None
) -> tuple[list[Gate], Firings | None, str | None]:
    """Gate 4, the firings it counts, and why the feature cannot be tested, if so; nothing for other directions."""
    if feature is None:
        return [], None, None
    name = f"feature {feature} of {dictionary.name}"
    if studied is None:
        unit = directions.of_vector(name, dictionary.sae.direction(feature), None).unit
        studied = Direction(name, unit, 0.0, "nowhere", dictionary.sae, feature)
    firings = _firings(bench, studied, texts)
    reason = firings.why_untested(name)
    if firings.s is None:
        reason = f"{name} fires nowhere in the tune texts, which would set its size"
    if reason:
        return [], firings, reason
    spliced = ce_recovered(
        bench.target.model, dictionary.sae, bench.tune, bench.layer,
        only_onsets=True, row_filter=bench.row_filter, **vars(bench.settings.resampling),
    )  # fmt: skip
    return [gates.dictionary_gate(spliced, firings)], replace(firings, ce_recovered=spliced), None


def _firings(bench: Bench, studied: Direction, texts: Sequence[Text]) -> Firings:
    """How often a feature fires in both models, and how large it is."""
    settings = bench.settings
    onsets = Onsets.of(texts, settings)
    needed = {"needs_onsets": settings.min_firings, "needs_tasks": settings.min_tasks}
    reference, target = bench.reference.model, bench.target.model
    in_target = count_firings(target, bench.layer, studied, onsets, **needed)
    same_width = reference.shape.d_model == target.shape.d_model
    in_reference = count_firings(reference, bench.layer, studied, onsets, **needed) if same_width else None
    size = studied.s or None
    median = float(bench.sizing_rows[0].norm(dim=1).median())
    return Firings(
        **vars(in_target),
        reference_onsets=in_reference and in_reference.onsets,
        s=size,
        s_from=studied.s_from,
        s_share_of_resid_norm=size and size / median,
    )


def _basis(bench: Bench) -> dict[str, BasisCheck]:
    """Held-out R2 of the maps between the streams, and between the embedding tables."""
    layers = sorted(bench.layers, reverse=True)
    checks = {f"resid_post {layer}": bench.bridge(bench.layer, layer).check for layer in layers}
    checks["embeddings"] = embedding_check(
        bench.target.model, bench.reference.model, seed=bench.settings.seed, row_filter=bench.row_filter
    )
    return checks


def check_inputs(pair: ModelPair, cache: ActivationCache, dictionary: Dictionary, settings: InterveneSettings) -> None:
    """Raise the `InputError` in which interventions with this dictionary would end."""
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
    check_settings(settings)


def _name(source: Source) -> str:
    if isinstance(source, int):
        return f"feature {source}"
    return "a vector" if isinstance(source, Tensor) else Path(source).stem if _is_file(source) else str(source)


def _is_file(source: Source) -> bool:
    return isinstance(source, Path) or (isinstance(source, str) and source not in directions.SOURCES)


def _identity(source: Source) -> str:
    """What fixes the direction besides the other inputs."""
    if isinstance(source, Tensor):
        return sha256(source.detach().double().cpu().numpy().tobytes())
    if _is_file(source) and Path(source).is_file():
        return sha256(Path(source))
    return _name(source)


def _note(source: Source) -> str:
    if not isinstance(source, int):
        return "the direction is one of the target model's stream after the dictionary's layer"
    return (
        f"an index belongs to its dictionary: feature {source} of this one is not feature {source} of any other, nor "
        "of the released InterpGPT dictionaries"
    )
