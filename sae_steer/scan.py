"""Which features of a dictionary are specific to one model: how often each fires at step onsets, in both.

1. The dictionary reads the scan split's streams of both models, the same positions in each.
2. `FiringCounter` counts firings by cell: model x text rendering x onset or elsewhere; and at the onsets
   of target-rendered text also by task, the cluster of every interval and test.
3. `FeatureScan` answers: rates with Wilson intervals at the design effect of the tasks, log-odds ratios with
   intervals, p of the paired difference corrected over all features (Benjamini-Hochberg), and what is specific.
4. Where the dictionary was compared with those of other seeds, each feature's stability stands beside.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sae_steer import stats
from sae_steer.cache import ActivationCache
from sae_steer.dictionary import Dictionary, check_fits
from sae_steer.errors import InputError
from sae_steer.progress import Progress, silent
from sae_steer.records import provenance, read_json, read_table, write_json, write_table
from sae_steer.sae.architectures import SparseDictionary
from sae_steer.sae.stability import SeedStability
from sae_steer.settings import ScanSettings

RECORD_FILE, TABLE_FILE, BY_TASK_FILE = "feature_diff.json", "features.parquet", "by_task.parquet"
TOP = 20
"""Features listed in the record."""


class FiringCounter:
    """Firings of every feature by cell, and by task within one cell. Batches may be cut anywhere."""

    def __init__(self, d_sae: int, n_cells: int, n_tasks: int):
        self.hits = torch.zeros(n_cells, d_sae, dtype=torch.int64)
        self.task_hits = torch.zeros(n_tasks, d_sae, dtype=torch.int64)

    @torch.no_grad()
    def update(
        self,
        sae: SparseDictionary,
        resid: Float[torch.Tensor, "row d_model"],
        cell: Int[np.ndarray, " row"],
        task: Int[np.ndarray, " row"],
    ) -> None:
        """Count a batch; `task` is -1 for rows that are counted by cell alone."""
        codes = sae.encode(resid)
        fires = codes.values != 0
        rows, features, d_sae = codes.rows[fires], codes.indices[fires], self.hits.shape[1]
        for counts, group in ((self.hits, cell), (self.task_hits, task)):
            mine = torch.from_numpy(group)[rows]
            chosen = (mine * d_sae + features)[mine >= 0]
            counts += torch.bincount(chosen, minlength=counts.numel()).view_as(counts)


@dataclass(frozen=True)
class FeatureScan:
    """Counts of a scan, and everything that follows from them."""

    dictionary: str
    target: str
    reference: str
    cells: dict[str, int]
    """Rows read in each cell, `model/rendering/onset` or `model/rendering/elsewhere`."""
    hits: dict[str, Int[np.ndarray, " d_sae"]]
    """Firings of every feature in each cell."""
    target_hits: Int[np.ndarray, "cluster d_sae"]
    reference_hits: Int[np.ndarray, "cluster d_sae"]
    trials: Int[np.ndarray, " cluster"]
    """Onsets of target-rendered text, by task."""
    settings: ScanSettings
    record: dict
    stability: SeedStability | None = None
    """The dictionary's features in those of other seeds, where they were compared."""

    @property
    def d_sae(self) -> int:
        """Features."""
        return self.target_hits.shape[1]

    @cached_property
    def target_rate(self) -> Float[np.ndarray, " d_sae"]:
        """Share of the onsets of target-rendered text at which each feature fires in the target model."""
        return self.target_hits.sum(0) / self.trials.sum()

    @cached_property
    def reference_rate(self) -> Float[np.ndarray, " d_sae"]:
        """The same onsets, read in the reference model."""
        return self.reference_hits.sum(0) / self.trials.sum()

    @cached_property
    def log_odds(self) -> stats.LogOdds:
        """Target against reference, paired at the onsets, clusters counted."""
        return stats.paired_log_odds(self.target_hits, self.reference_hits, self.trials[:, None])

    @cached_property
    def p(self) -> Float[np.ndarray, " d_sae"]:
        """Of the paired difference in rates."""
        return stats.paired_rate_p(self.target_hits, self.reference_hits, self.trials[:, None])

    @cached_property
    def q(self) -> Float[np.ndarray, " d_sae"]:
        """`p` corrected over all features."""
        return stats.benjamini_hochberg(self.p)

    @cached_property
    def alive(self) -> Bool[np.ndarray, " d_sae"]:
        """Features that fire anywhere in the scan."""
        return sum(self.hits.values()) > 0

    @cached_property
    def percentile(self) -> Float[np.ndarray, " d_sae"]:
        """Where the lower bound of the log-odds stands among the alive features, in percent."""
        return stats.percentile_among(self.log_odds.low, self.alive)

    @cached_property
    def task_share(self) -> Float[np.ndarray, " d_sae"]:
        """Share of the tasks at some onset of which each feature fires in the target model."""
        return (self.target_hits > 0).mean(0)

    @cached_property
    def specific(self) -> Bool[np.ndarray, " d_sae"]:
        """Features specific to the target model, by the settings' three conditions."""
        return (
            (self.target_rate >= self.settings.min_rate)
            & (self.q < self.settings.max_q)
            & (self.target_rate >= self.settings.min_ratio * self.reference_rate)
        )

    @property
    def specific_features(self) -> list[int]:
        """The indices of the specific features."""
        return np.flatnonzero(self.specific).tolist()

    def top(self, count: int) -> list[int]:
        """The specific features that fire in enough tasks, the highest lower bound of the log-odds first."""
        order = np.argsort(-self.log_odds.low, kind="stable")
        wanted = self.specific & (self.task_share >= self.settings.min_task_share)
        return [int(feature) for feature in order if wanted[feature]][:count]

    def like_2504(self) -> int:
        """The feature nearest the released phenotype: fires at .59 of onsets, at no more than .005 in the reference."""
        candidates = self._like_2504
        if not len(candidates):
            raise InputError(
                f"every feature of '{self.target}' fires at more than {self.settings.like_max_reference} of the onsets "
                f"in '{self.reference}'; name one by its index"
            )
        return int(candidates[0])

    @cached_property
    def _like_2504(self) -> Int[np.ndarray, " candidate"]:
        """Features all but silent in the reference, nearest the released rate first."""
        limits = self.settings
        found = np.flatnonzero((self.target_rate > 0) & (self.reference_rate <= limits.like_max_reference))
        return found[np.argsort(np.abs(self.target_rate[found] - limits.like_rate), kind="stable")]

    def resolve(self, feature: str) -> int:
        """The index meant by `top`, `like-2504` or a number."""
        if feature == "top":
            found = self.top(1)
            if not found:
                raise InputError(
                    "no feature is specific to the target model and fires in "
                    f"{self.settings.min_task_share:.0%} of the tasks; name one by its index, or try like-2504"
                )
            return found[0]
        if feature == "like-2504":
            return self.like_2504()
        return resolve_index(feature, self.d_sae)

    def table(self, count: int) -> str:
        """The top features, counts beside the rates; their cosines with other seeds' matches, where there are some."""
        sides = f"{self.target + ' fires':>16} {self.reference + ' fires':>16}"
        seeds = "" if self.stability is None else f" {'in other seeds':>17}"
        lines = [f"{'feature':>8} {sides} {'log-odds':>22} {'q':>9}{seeds}"]
        for feature in self.top(count):
            row = self.row(feature)
            odds = f"{row['log_odds']:.2f} [{row['log_odds_low']:.2f}, {row['log_odds_high']:.2f}]"
            fires = [f"{row[f'{side}_hits']} ({row[f'{side}_rate']:.4f})" for side in ("target", "reference")]
            if seeds:
                seeds = f" {row['stability']:>6.2f} (min {row['stability_least']:.2f})"
            lines.append(f"{feature:>8} {fires[0]:>16} {fires[1]:>16} {odds:>22} {row['q']:>9.1e}{seeds}")
        lines.append(
            f"{self.specific.sum()} of {self.alive.sum()} alive features are specific; "
            f"counted at {self.trials.sum()} onsets of {len(self.trials)} tasks"
        )
        return "\n".join(lines)

    def row(self, feature: int) -> dict:
        """What the scan knows of one feature; its stability is None where the dictionary has no other seeds."""
        known = {name: column[feature].item() for name, column in self.columns.items()}
        return {"stability": None, "stability_least": None} | known

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The table: one row a feature."""
        intervals = {}
        for name, by_task in (("target", self.target_hits), ("reference", self.reference_hits)):
            effect = stats.design_effect(by_task, self.trials[:, None])
            low, high = stats.wilson(by_task.sum(0), np.full(self.d_sae, self.trials.sum()), deff=effect)
            intervals |= {f"{name}_rate_low": low, f"{name}_rate_high": high}
        found = self.stability
        seeds = {} if found is None else {"stability": found.mean, "stability_least": found.least}
        return {
            "feature": np.arange(self.d_sae),
            "target_hits": self.target_hits.sum(0),
            "reference_hits": self.reference_hits.sum(0),
            "task_share": self.task_share,
            "onsets": np.full(self.d_sae, self.trials.sum()),
            "target_rate": self.target_rate,
            "reference_rate": self.reference_rate,
            **intervals,
            "log_odds": self.log_odds.log_odds,
            "log_odds_low": self.log_odds.low,
            "log_odds_high": self.log_odds.high,
            "p": self.p,
            "q": self.q,
            "percentile": self.percentile,
            "alive": self.alive,
            "specific": self.specific,
            **seeds,
            **{f"hits/{cell}": hits for cell, hits in self.hits.items()},
        }

    def onset_rate(self, model: str) -> Float[np.ndarray, " d_sae"]:
        """Share of all onsets, of both renderings, at which each feature fires in `model`."""
        cells = [cell for cell in self.cells if cell.startswith(f"{model}/") and cell.endswith("/onset")]
        return sum(self.hits[cell] for cell in cells) / sum(self.cells[cell] for cell in cells)


def scan_features(
    cache: ActivationCache,
    dictionary: Dictionary,
    *,
    settings: ScanSettings | None = None,
    split: str = "scan",
    on_rows: Progress = silent,
) -> FeatureScan:
    """Count the dictionary's firings over a split of the cache, in both models."""
    check_fits(dictionary, cache)
    target = dictionary.model
    reference = next(name for name in cache.manifest["models"] if name != target)
    _check_widths(cache, dictionary, reference)
    labels = cache.labels(split)
    onset, rendering = labels["is_onset"].astype(bool), labels["text_variant"].astype(np.int64)
    among = onset & np.isin(rendering, cache.own_variants(target))
    tasks, task = np.unique(labels["task"][among], return_inverse=True)
    if len(tasks) < 2:
        raise InputError(
            f"the '{split}' texts have onsets of {len(tasks)} tasks, and intervals over tasks need 2 or more; "
            "cache more texts, or check the pair's [onset]"
        )
    by_task = np.full(len(onset), -1)
    by_task[among] = task
    cell, names = rendering * 2 + ~onset, [f"{v}/{place}" for v in cache.variants for place in ("onset", "elsewhere")]
    counters = {}
    for done, model in enumerate((target, reference)):
        counters[model] = FiringCounter(dictionary.sae.config.d_sae, len(names), len(tasks))
        start = 0
        for resid in cache.rows(model, dictionary.layer, split).in_order():
            here = slice(start, start + len(resid))
            counters[model].update(dictionary.sae, resid, cell[here], by_task[here])
            start = here.stop
            on_rows(done * len(cell) + start, 2 * len(cell), f"rows of {model}")
    sizes = np.bincount(cell, minlength=len(names)).tolist()
    return FeatureScan(
        dictionary=dictionary.name,
        target=target,
        reference=reference,
        cells={f"{model}/{name}": size for model in counters for name, size in zip(names, sizes, strict=True)},
        hits={
            f"{model}/{name}": kept.hits[i].numpy() for model, kept in counters.items() for i, name in enumerate(names)
        },
        target_hits=counters[target].task_hits.numpy(),
        reference_hits=counters[reference].task_hits.numpy(),
        trials=np.bincount(task),
        settings=settings or ScanSettings(),
        record=dictionary.record,
        stability=dictionary.stability,
    )


def _check_widths(cache: ActivationCache, dictionary: Dictionary, reference: str) -> None:
    ours, theirs = dictionary.sae.config.d_in, cache.manifest["models"][reference]["d_model"]
    if ours != theirs:
        raise InputError(
            f"a scan reads both models through one dictionary: {dictionary.name} reads {ours} dimensions, and model "
            f"'{reference}' has {theirs}; take a pair of one width"
        )


def resolve_index(feature: str, d_sae: int) -> int:
    """The index a user typed, if the dictionary has it."""
    try:
        index = int(feature)
    except ValueError as error:
        raise InputError(f"--feature takes an index, top or like-2504, not {feature!r}") from error
    if not 0 <= index < d_sae:
        raise InputError(f"feature {index} is not in this dictionary; it has features 0 to {d_sae - 1}")
    return index


def scan_provenance(cache: ActivationCache, dictionary: Dictionary, settings: ScanSettings) -> dict:
    """What fixes a scan's result."""
    return provenance(settings=settings, inputs={"cache": cache.sha256, "dictionary": dictionary.sha256})


def save_scan(scan: FeatureScan, folder: Path, origin: Mapping) -> Path:
    """Write the table, the counts by task, and `feature_diff.json`: the released keys, then ours.

    The record is removed first and written last, so a folder that has one is whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_FILE).unlink(missing_ok=True)
    write_table(folder / TABLE_FILE, scan.columns)
    by_task = {
        "onsets": scan.trials,
        "target_hits": list(scan.target_hits),
        "reference_hits": list(scan.reference_hits),
    }
    write_table(folder / BY_TASK_FILE, by_task)
    nearest = scan._like_2504[:1].tolist()
    record = {
        "provenance": origin,
        **_released(scan),
        "dictionary": scan.dictionary,
        "target": scan.target,
        "reference": scan.reference,
        "cells": scan.cells,
        "onsets": int(scan.trials.sum()),
        "tasks": len(scan.trials),
        "alive": int(scan.alive.sum()),
        "d_sae": scan.d_sae,
        "criteria": asdict(scan.settings),
        "seed_stability": scan.stability and scan.stability.sha256,
        "top": [scan.row(feature) for feature in scan.top(TOP)],
        "like_2504": scan.row(nearest[0]) if nearest else None,
    }
    return write_json(folder / RECORD_FILE, record)


def _released(scan: FeatureScan) -> dict:
    """The keys of the released study's record; those that need another dictionary's scan are null."""
    figures = {key: scan.record.get(key) for key in ("final_fve", "final_l0", "dead_pct_train", "dead_pct_heldout")}
    rates = {f"{_short(model)}_rate": scan.onset_rate(model) for model in (scan.target, scan.reference)}
    specific = np.flatnonzero(scan.specific)
    falling = specific[np.argsort(-scan.onset_rate(scan.target)[specific], kind="stable")]
    return {
        "sae_results": {scan.dictionary.removesuffix("_hook_resid_post"): figures},
        "primary_count": len(specific),
        "symmetry_count": None,
        "layer_control_count": None,
        "primary_top_features": [
            {"feat_id": feature, **{key: float(rate[feature]) for key, rate in rates.items()}}
            for feature in falling[:TOP].tolist()
        ],
    }


def load_scan(folder: Path, dictionary: Dictionary) -> FeatureScan:
    """A scan `save_scan` wrote; one of another dictionary is refused."""
    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file():
        raise InputError(f"no scan in {folder}; run `sae-steer scan` first, or name one with --scan")
    record = read_json(folder / RECORD_FILE)
    if "provenance" not in record:  # the released study's record has this name too
        raise InputError(f"{folder / RECORD_FILE} was not written by sae-steer; run `sae-steer scan`")
    if record["provenance"]["inputs"]["dictionary"] != dictionary.sha256:
        raise InputError(
            f"the scan in {folder} is of another dictionary than {dictionary.name}; run `sae-steer scan` again"
        )
    table, by_task = read_table(folder / TABLE_FILE), read_table(folder / BY_TASK_FILE)
    return FeatureScan(
        dictionary=record["dictionary"],
        target=record["target"],
        reference=record["reference"],
        cells=record["cells"],
        hits={name.removeprefix("hits/"): column for name, column in table.items() if name.startswith("hits/")},
        target_hits=np.stack(list(by_task["target_hits"])),
        reference_hits=np.stack(list(by_task["reference_hits"])),
        trials=by_task["onsets"],
        settings=ScanSettings(**record["criteria"]),
        record=dictionary.record,
        stability=dictionary.stability,
    )


def tells_stability(folder: Path, scan: FeatureScan) -> bool:
    """Whether the saved scan has the stability its dictionary has now: seeds may have been learned since."""
    return read_json(Path(folder) / RECORD_FILE).get("seed_stability") == (scan.stability and scan.stability.sha256)


def _short(model: str) -> str:
    """The released keys say std where the model is called standard."""
    return "std" if model == "standard" else model
