"""Heads of two models: matched by what they attend to, and what plans lose without each (the card's head swap)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_steer.cache import ActivationCache
from sae_steer.errors import InputError
from sae_steer.findings.head_ablation import HeadAblations, ablate_heads, ablations_of, plan_tasks
from sae_steer.findings.head_match import HeadMatching, HeadPair, match_heads
from sae_steer.findings.head_profiles import read_profiles
from sae_steer.model.heads import check_has_heads
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text
from sae_steer.progress import Progress, silent
from sae_steer.records import hashes_of, provenance, write_json, write_table
from sae_steer.settings import HeadsSettings

RECORD_FILE, TABLE_FILE, PER_SEED_FILE = "heads.json", "heads.parquet", "causal_nulls_per_seed.json"
FILES = (RECORD_FILE, TABLE_FILE, PER_SEED_FILE)
FEWEST_TASKS = 5
"""With fewer, permuting or resampling tasks says nothing."""


@dataclass(frozen=True)
class HeadStudy:
    """Two models' heads, matched and taken out."""

    pair: str
    reference: str
    target: str
    texts: int
    tasks: int
    matching: HeadMatching
    ablations: HeadAblations | None
    """None where plans cannot be sampled, or were not asked for."""
    origin: dict

    @property
    def sentence(self) -> str:
        """What was found, to be repeated."""
        found = self.matching.broadcast
        swap = "the same index" if found.reference == found.target else "another index"
        matched = "matched with each other" if found.matched else "not matched with each other"
        parts = [
            f"the step-layout-broadcast head is {found.reference} in {self.reference} and {found.target} in "
            f"{self.target} ({swap}, {matched}; profile cosine {found.pair.raw.value:.3f}, at equal index "
            f"{' and '.join(f'{pair.raw.value:.3f}' for pair in found.same_index)})"
        ]
        if self.ablations:
            parts += [
                f"without {effect.head} ({effect.way}) Spearman(complexity, steps) goes from "
                f"{self.ablations.baseline.value:.2f} by {effect.change.value:+.3f} "
                f"[{effect.change.low:+.3f}, {effect.change.high:+.3f}], p among heads {effect.p_heads:.2f}"
                for effect in self.ablations.of(found.target)
            ]
        return "; ".join(parts)

    def record(self) -> dict[str, Any]:
        """What `heads.json` holds."""
        matching = self.matching
        return {
            "provenance": self.origin,
            "pair": self.pair,
            "reference": self.reference,
            "target": self.target,
            "texts": self.texts,
            "tasks": self.tasks,
            "heads": list(matching.raw.shape),
            "summary": self.sentence,
            "matched_raw": _mean_cosine([match.pair for match in matching.matches], "raw"),
            "matched_centred": _mean_cosine([match.pair for match in matching.matches], "centred"),
            "same_index_raw": matching.same_index_raw,
            "same_index_centred": matching.same_index_centred,
            "in_place": matching.in_place,
            "in_layer": matching.in_layer,
            "broadcast": asdict(matching.broadcast),
            "matches": [asdict(match) for match in matching.matches],
            "centred": matching.centred.round(4).tolist(),
            "ablations": asdict(self.ablations) if self.ablations else None,
        }

    def save(self, out: Path) -> Path:
        """Write the table and the released study's per-seed file, then the record; returns the record's path."""
        beside = ()
        if self.ablations:
            beside = (PER_SEED_FILE, TABLE_FILE)
            write_json(out / PER_SEED_FILE, self.ablations.per_seed(self.matching.broadcast.target))
            write_table(out / TABLE_FILE, _ablation_columns(self.ablations))
        return write_json(out / RECORD_FILE, self.record() | {"files": hashes_of(out, beside)})


def heads_provenance(pair: ModelPair, cache: ActivationCache, settings: HeadsSettings) -> dict:
    """What fixes a study of heads."""
    return provenance(settings=settings, inputs={"pair": pair.sha256, "cache": cache.sha256})


def study_heads(
    pair: ModelPair,
    cache: ActivationCache,
    *,
    settings: HeadsSettings | None = None,
    on_step: Progress = silent,
) -> HeadStudy:
    """Match all heads on the confirm split's texts, then sample plans without each of the target's."""
    settings = settings or HeadsSettings()
    cache.check_pair(pair)
    for model in pair.models:
        check_has_heads(model.model, model.name)
    texts = _texts(cache, settings)
    chosen = plan_tasks(pair, texts, settings.ablation_prompts) if settings.ablation_prompts else []
    shape = pair.target.model.shape
    heads = shape.n_layers * shape.n_heads
    total = 3 + (len(ablations_of(heads, shape.n_heads, 0, settings)) if chosen else 0)
    profiles = []
    for done, model in enumerate(pair.models):
        on_step(done, total, f"reading the attention of {model.name}")
        profiles.append(read_profiles(model.model, texts))
    on_step(2, total, "matching")
    matching = match_heads(*profiles, settings)

    def ablated(done: int, of: int, note: str = "") -> None:
        on_step(3 + done, total, note)

    studied = int(profiles[1].over().broadcast.argmax())
    ablations = ablate_heads(pair, pair.target, profiles[1], chosen, studied, settings, ablated) if chosen else None
    on_step(total, total, "studied")
    return HeadStudy(
        pair=pair.name,
        reference=pair.reference.name,
        target=pair.target.name,
        texts=len(texts),
        tasks=profiles[0].tasks,
        matching=matching,
        ablations=ablations,
        origin=heads_provenance(pair, cache, settings),
    )


def _texts(cache: ActivationCache, settings: HeadsSettings) -> list[Text]:
    """Of every rendering as many texts as are asked for, with two steps at least."""
    whole = [text for text in cache.texts("confirm") if text.is_onset.sum() > 1]
    chosen = []
    for variant in range(len(cache.variants)):
        chosen += [text for text in whole if text.rendering == variant][: settings.prompts]
    tasks = len({text.task for text in chosen})
    if tasks < FEWEST_TASKS:
        raise InputError(
            f"the confirm texts with two or more steps are of {tasks} tasks, and heads are matched over {FEWEST_TASKS} "
            "or more; cache more texts, or raise --prompts"
        )
    return chosen


def _mean_cosine(pairs: list[HeadPair], kind: str) -> float:
    return float(np.mean([getattr(pair, kind).value for pair in pairs]))


def _ablation_columns(ablations: HeadAblations) -> dict[str, Any]:
    """One row a head and way."""
    effects = ablations.effects
    return {
        "head": [effect.head for effect in effects],
        "way": [effect.way for effect in effects],
        "change": [effect.change.value for effect in effects],
        "low": [effect.change.low for effect in effects],
        "high": [effect.change.high for effect in effects],
        "median_change": [effect.median_change for effect in effects],
        "p_heads": [effect.p_heads for effect in effects],
        "mean_steps": [effect.mean_steps for effect in effects],
    }
