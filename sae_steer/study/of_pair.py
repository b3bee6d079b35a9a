"""A direction's causal effect on the target behaviour, under the interventions that can be made with it.

1. The plan is written: source, settings, measured tokens, the content of every split.
2. On train and tune texts: maps between the models' streams, the size of dose 1, control directions.
3. On confirm texts, onsets in the target's rendering, the same for all variants: `protocol.weigh`.
4. Beside it the card's own measure: the regulation rate of sampled plans at dose 1.

A feature that hardly fires is not tested: its verdict is INVALID, with the counts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from sae_steer.cache import ActivationCache
from sae_steer.corpus import TargetTokens
from sae_steer.dictionary import Dictionary, check_fits
from sae_steer.edits import directions
from sae_steer.edits.arms import Bench
from sae_steer.edits.basis import embedding_check
from sae_steer.edits.variants import Direction
from sae_steer.effects.firings import count_firings, why_untested
from sae_steer.effects.group import features_like, read_group
from sae_steer.effects.readings import ControlRows, Onsets
from sae_steer.effects.sampled import SampledArms, plan_prompts
from sae_steer.effects.splicing import ce_recovered
from sae_steer.effects.trace import direct_effect, trace
from sae_steer.errors import InputError
from sae_steer.files import sha256
from sae_steer.model.readout import TargetMass
from sae_steer.outputs import writing
from sae_steer.pair.model_pair import ModelPair
from sae_steer.progress import Progress, silent
from sae_steer.records import hashes_of, provenance, read_json, read_table, write_json, write_table
from sae_steer.settings import SPLITS, InterveneSettings
from sae_steer.study import gates
from sae_steer.study.plan import PLAN_FILE, Plan, fix_plan
from sae_steer.study.protocol import check_settings, weigh
from sae_steer.study.released import deepdive_steering, three_probes
from sae_steer.study.table import table
from sae_steer.study.verdict import INVALID

RECORD_FILE, TRIALS_FILE = "results.json", "trials.parquet"
RELEASED = {"deepdive_steering.json": deepdive_steering, "three_probes.json": three_probes}
FILES = (RECORD_FILE, TRIALS_FILE, *RELEASED, PLAN_FILE)
"""What a study's folder is made of."""
TRACE_TEXTS = 60
"""Confirm texts in which each arm's edit is followed through the blocks above."""
FIT_TEXTS = 300
"""Train texts on which the maps between the streams are fitted."""

Source = int | str | Path | Tensor
"""A feature's index, one of `directions.SOURCES`, a file with a vector, or a vector."""


@dataclass(frozen=True)
class Study:
    """The record of one direction's interventions and the trials it rests on."""

    record: dict
    trials: Mapping[str, np.ndarray]
    controls: Sequence[ControlRows] = ()
    """The trials of control directions: rows of `trials.parquet` with a `family`, which `load_study` leaves there."""

    @property
    def verdict(self) -> str:
        """NULL, CAUSAL, OPPOSITE, NON-SPECIFIC, INCONCLUSIVE or INVALID."""
        return self.record["verdict"]

    @property
    def tested(self) -> bool:
        """Whether the direction could be tested at all."""
        return self.record["tested"]

    def table(self) -> str:
        """The verdict, why, and what was measured at the primary dose."""
        return table(self.record)

    def save(self, folder: Path) -> Path:
        """Write `trials.parquet`, the released study's records, and `results.json`; returns the latter.

        The record is removed first and written last, so a folder that has one is whole.
        """
        folder = Path(folder)
        with writing(folder, FILES):
            for name in (RECORD_FILE, TRIALS_FILE, *RELEASED):
                (folder / name).unlink(missing_ok=True)
            if self.tested:
                write_table(folder / TRIALS_FILE, self.trials, (part.columns() for part in self.controls))
            for name, told in RELEASED.items():
                write_json(folder / name, told(self.record))
            record = {**self.record, "files": hashes_of(folder, [TRIALS_FILE] if self.tested else [])}
            return write_json(folder / RECORD_FILE, record)


def load_study(folder: Path) -> Study:
    """A study `Study.save` wrote."""
    record = read_json(Path(folder) / RECORD_FILE)
    return Study(record, read_table(Path(folder) / TRIALS_FILE, {"family": ""}, of=record) if record["tested"] else {})


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
    found = find_direction(bench, dictionary, source)
    record = {
        "provenance": study_provenance(pair, cache, dictionary, source, settings, leave_out),
        "plan": plan.record() if plan else None,
        "dictionary": dictionary.name,
        "dictionary_sha256": dictionary.sha256,
        "feature": feature,
        "specific_features": None if leave_out is None else len(leave_out),
        "direction": _name(source),
        "note": _note(source),
        "pair": pair.name,
        "target_tokens": tokens.described(pair.tokenizer),
    }
    texts = cache.own_texts("confirm", pair.target.name)[: settings.prompts]
    known, firings, reason = dictionary_gate(bench, dictionary, found, texts, feature)
    if reason or found is None:
        untested = {"tested": False, "reason": reason, "firings": firings, "verdict": INVALID, "quick": settings.quick}
        return Study({**record, **untested}, {})
    arms = bench.arms(found, leave_out=leave_out)
    stages = 2 * len(arms)
    evidence = weigh(
        arms, texts, bench.measure, settings,
        known_gates=known, on_step=lambda done, total, note="": on_step(done, stages, note),
    )  # fmt: skip
    sampled = SampledArms(pair, plan_prompts(pair, texts[: settings.generations]), settings)
    followed = Onsets.of(texts[:TRACE_TEXTS], settings).single
    for number, (arm, variant) in enumerate(zip(arms, evidence.record["variants"], strict=True), len(arms)):
        on_step(number, stages, f"{arm.variant.name}: sampled plans")
        variant["sampled"] = sampled.read(arm)
        reads = directions.unembedding(arm.model.model, tokens.ids)
        given = arm.model.model, arm.layer, arm.edit(settings.primary_dose), followed
        variant["trace"] = {"blocks": trace(*given, reads), "direct": direct_effect(*given, bench.measure, settings)}
    group, trials = None, evidence.trials
    if feature is not None:
        like = features_like(found, *bench.sizing_rows)
        given = bench.target.model, bench.layer, found, like
        group, more = read_group(*given, Onsets.of(texts, settings), bench.measure, settings)
        trials = {name: np.concatenate([column, more[name]]) for name, column in trials.items()}
    on_step(stages, stages, "measured")
    measured = {
        "tested": True,
        "reason": None,
        "firings": firings,
        "basis": _basis(bench),
        "rows_left_out": bench.tuned.selection.left_out.record(),
        "group": group,
    }
    return Study({**record, **measured, **evidence.record}, trials, evidence.controls)


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


def dictionary_gate(bench: Bench, dictionary: Dictionary, found: Direction | None, texts, feature: int | None):
    """Gate 4, the firings it counts, and why the direction cannot be tested, if so; nothing for other directions."""
    settings = bench.settings
    if feature is None:
        return [], None, None
    name = f"feature {feature} of {dictionary.name}"
    if found is None:
        silent_ = directions.of_vector(name, dictionary.sae.direction(feature), None)
        found = Direction(name, silent_.unit, 0.0, "nowhere", dictionary.sae, feature)
    onsets = Onsets.of(texts, settings)
    firings = count_firings(bench.target.model, bench.layer, found, onsets, settings)
    if bench.reference.model.shape.d_model == bench.target.model.shape.d_model:
        other = count_firings(bench.reference.model, bench.layer, found, onsets, settings)
        firings["reference_onsets"] = other["onsets"]
    size = found.s or None
    median = float(bench.sizing_rows[0].norm(dim=1).median())
    firings |= {"s": size, "s_from": found.s_from, "s_share_of_resid_norm": size and size / median}
    reason = why_untested(firings, name)
    if size is None:
        reason = f"{name} fires nowhere in the tune texts, which would set its size"
    if reason:
        return [], firings, reason
    draws = {"draws": settings.bootstrap_draws, "seed": settings.seed}
    spliced = ce_recovered(
        bench.target.model, dictionary.sae, bench.tune, bench.layer,
        only_onsets=True, row_filter=bench.row_filter, **draws,
    )  # fmt: skip
    return [gates.dictionary_gate(spliced, firings)], {**firings, "ce_recovered": spliced.record()}, None


def _basis(bench: Bench) -> dict:
    """Held-out R2 of the maps between the streams, and between the embedding tables."""
    checks = {
        f"resid_post {layer}": bench.bridge(bench.layer, layer).check for layer in sorted(bench.layers, reverse=True)
    }
    models = bench.target.model, bench.reference.model
    checks["embeddings"] = embedding_check(*models, seed=bench.settings.seed, row_filter=bench.row_filter)
    return {place: asdict(check) for place, check in checks.items()}


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
