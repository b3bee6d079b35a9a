"""Every specific feature of a scan through the four interventions, and an estimate for all that are alive.

1. The size of dose 1 of every alive feature from the tune texts, and its direction in each edited stream, both by
   the rules of a study of one feature.
2. At the confirm onsets of such a study, each edited alone: the exact effect of every tested feature under every
   variant, by suffix replay; and the measure's gradient, from which the effect of every alive feature is estimated
   (`attribution`).
3. At some of these onsets the effects of thousands of control directions (`pool`, which says what the null is).
4. Each effect against the bound, with the contrast a study uses, and among the controls; both corrected over all
   features and variants together (Benjamini-Hochberg). `survey` does 1 to 4; this file says of what.

A tag is no verdict: gates are not checked and nothing is edited jointly. `study.intervene` is for that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from sae_steer import stats
from sae_steer.atlas.survey import Survey, as_of_one_study
from sae_steer.cache import ActivationCache
from sae_steer.dictionary import Dictionary
from sae_steer.edits import directions
from sae_steer.edits.arms import Bench
from sae_steer.edits.variants import Direction
from sae_steer.effects.estimates import estimates
from sae_steer.effects.readings import Onsets
from sae_steer.errors import InputError
from sae_steer.files import sha256
from sae_steer.outputs import writing
from sae_steer.pair.model_pair import ModelPair
from sae_steer.progress import Progress, silent
from sae_steer.records import hashes_of, provenance, read_json, read_table, write_json, write_table
from sae_steer.settings import AtlasSettings
from sae_steer.study.of_pair import bench_of, check_inputs
from sae_steer.typed_json import as_json

RECORD_FILE, TABLE_FILE = "atlas.json", "atlas.parquet"
FILES = (RECORD_FILE, TABLE_FILE)


@dataclass(frozen=True)
class Atlas:
    """The record, which holds the tested features, and a table with a row for every alive feature and variant."""

    record: dict
    table: Mapping[str, np.ndarray]

    def save(self, folder: Path) -> Path:
        """Write `atlas.parquet` and `atlas.json`; returns the latter, which is removed first and written last."""
        folder = Path(folder)
        with writing(folder, FILES):
            (folder / RECORD_FILE).unlink(missing_ok=True)
            write_table(folder / TABLE_FILE, self.table)
            record = {**self.record, "files": hashes_of(folder, [TABLE_FILE])}
            return write_json(folder / RECORD_FILE, record)

    def summary(self) -> str:
        """What became of the tested features, a line a variant."""
        record = self.record
        lines = [
            f"{record['tested']} features at {record['n']} onsets of {record['tasks']} tasks; "
            f"bound {100 * record['bound']['value']:.2f} points"
        ]
        for variant in record["variants"]:
            tags = ", ".join(f"{count} {tag}" for tag, count in variant["tags"].items() if count)
            error, band = variant["estimate"], variant["null"]
            correlated = "" if error["correlation"] is None else f"; estimate's correlation {error['correlation']:.3f}"
            lines.append(
                f"{variant['variant']:>12}: {tags}; {variant['discoveries']} stand out of {band['draws']} controls "
                f"(95 % in {100 * band['low']:+.3f} to {100 * band['high']:+.3f} points){correlated}"
            )
        return "\n".join(lines)


def load_atlas(folder: Path) -> Atlas:
    """An atlas `Atlas.save` wrote."""
    record = read_json(Path(folder) / RECORD_FILE)
    return Atlas(record, read_table(Path(folder) / TABLE_FILE, of=record))


def atlas_provenance(
    pair: ModelPair,
    cache: ActivationCache,
    dictionary: Dictionary,
    features: Sequence[int],
    alive: Int[np.ndarray, " alive"],
    log_odds: Float[np.ndarray, " d_sae"],
    settings: AtlasSettings,
) -> dict:
    """What fixes an atlas's result."""
    inputs = {
        "pair": pair.sha256,
        "cache": cache.sha256,
        "rows": cache.row_filter.identity,
        "dictionary": dictionary.sha256,
        "features": sha256(repr(sorted(features)).encode()),
        "scan": sha256(alive.astype(np.int64).tobytes(), log_odds.tobytes()),
    }
    return provenance(settings=settings, inputs=inputs)


def make_atlas(
    pair: ModelPair,
    dictionary: Dictionary,
    *,
    features: Sequence[int],
    alive: Int[np.ndarray, " alive"],
    log_odds: Float[np.ndarray, " d_sae"],
    cache: ActivationCache,
    settings: AtlasSettings | None = None,
    on_step: Progress = silent,
) -> Atlas:
    """Measure every one of `features` under the four variants, and estimate all that are `alive`.

    Args:
        features: those specific to the target model; none of them is a control direction.
        log_odds: how specific each feature of the dictionary is, from the scan; kept beside the effects.
    """
    settings = settings or AtlasSettings()
    study = as_of_one_study(settings)
    check_inputs(pair, cache, dictionary, study)
    dictionary = dictionary.to(pair.target.model.device)
    if not len(features):
        raise InputError(
            f"no feature of {dictionary.name} is specific to '{pair.target.name}', so there is none to map; scan with "
            "a lower --min-ratio or --min-rate, or name a feature with --feature"
        )
    tokens = cache.target_tokens(pair)
    bench = bench_of(pair, dictionary, cache, tokens, study)
    sized = _sized(bench, sorted({*alive.tolist(), *features}))
    tested = [feature for feature in sorted(features) if feature in sized]
    if not tested:
        raise InputError(
            f"none of the {len(features)} specific features fires in the tune texts, which would set its size; cache "
            "more tune texts"
        )
    onsets = Onsets.of(cache.own_texts("confirm", pair.target.name)[: settings.prompts], study).single
    stats.check_clusters(onsets.task)
    survey = Survey(bench, sized, tuple(tested), onsets, settings)
    charts, steps = [], len(onsets.batches)
    for number, place in enumerate(places := survey.places):
        named = " and ".join(variant.name for variant in place.variants)
        swept = place.read(
            onsets,
            bench.measure,
            lambda done, first=number * steps, named=named: on_step(first + done, len(places) * steps, named),
        )
        charts += [survey.chart(place, swept, variant) for variant in place.variants]
    rows = survey.judged(charts, log_odds)
    record = {
        "provenance": atlas_provenance(pair, cache, dictionary, features, alive, log_odds, settings),
        "dictionary": dictionary.name,
        "dictionary_sha256": dictionary.sha256,
        "pair": pair.name,
        "target": pair.target.name,
        "reference": pair.reference.name,
        "target_tokens": tokens.described(pair.tokenizer),
        "alive": len(sized),
        "tested": len(tested),
        "silent": [feature for feature in sorted(features) if feature not in sized],
        "n": len(onsets),
        "tasks": onsets.tasks,
        "gap": as_json(estimates(survey.gap(charts)[:, None], onsets, settings.resampling)[0]),
        "bound": {"share": settings.bound_share, "cap": settings.bound_cap, "value": survey.bound(charts)},
        "variants": [survey.described(chart, rows) for chart in charts],
        "features": rows,
    }
    on_step(len(places) * steps, len(places) * steps, "measured")
    return Atlas(record, survey.table(charts, rows, log_odds))


def _sized(bench: Bench, features: list[int]) -> dict[int, Direction]:
    """The direction and dose 1 of every feature that fires in the tune texts."""
    assert bench.dictionary is not None
    studied = directions.feature_directions(bench.dictionary, features, *bench.sizing_rows)
    return {feature: direction for feature, direction in zip(features, studied, strict=True) if direction is not None}
