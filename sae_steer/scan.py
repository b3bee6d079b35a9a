"""Which features of a dictionary are specific to one model: how often each fires at step onsets, in both.

1. The dictionary reads the scan split's streams of both models, the same positions in each.
2. `FiringCounter` counts firings by cell: model x text rendering x onset or elsewhere; and at the onsets
   of target-rendered text also by task, the cluster of every interval and test.
3. `FeatureScan` answers: rates with Wilson intervals at the design effect of the tasks, log-odds ratios with
   intervals, p of the paired difference corrected over all features (Benjamini-Hochberg), and what is specific.
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
from sae_steer.records import provenance, read_json, read_table, write_json, write_table
from sae_steer.runtime import Progress, silent
from sae_steer.sae.architectures import TopKSAE
from sae_steer.settings import ScanSettings

RECORD_FILE, TABLE_FILE = "feature_diff.json", "features.parquet"
TOP = 20


class FiringCounter:
    """Firings of every feature by cell, and by task within one cell. Batches may be cut anywhere."""

    def __init__(self, d_sae: int, n_cells: int, n_tasks: int):
        self.hits = torch.zeros(n_cells, d_sae, dtype=torch.int64)
        self.task_hits = torch.zeros(n_tasks, d_sae, dtype=torch.int64)

    @torch.no_grad()
    def update(
        self,
        sae: TopKSAE,
        resid: Float[torch.Tensor, "row d_model"],
        cell: Int[np.ndarray, " row"],
        task: Int[np.ndarray, " row"],
    ) -> None:
        """Count a batch; `task` is -1 for rows that are counted by cell alone."""
        codes = sae.encode(resid)
        fires, d_sae = codes.values > 0, self.hits.shape[1]
        for counts, group in ((self.hits, cell), (self.task_hits, task)):
            places = torch.from_numpy(group)[:, None] * d_sae + codes.indices
            chosen = places[fires & torch.from_numpy(group >= 0)[:, None]]
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
    trials: Int[np.ndarray, "cluster"]
    """Onsets of target-rendered text, by task."""
    settings: ScanSettings
    record: dict

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
    def specific(self) -> Bool[np.ndarray, " d_sae"]:
        """Features specific to the target model, by the settings' three conditions."""
        return (
            (self.target_rate >= self.settings.min_rate)
            & (self.q < self.settings.max_q)
            & (self.target_rate >= self.settings.min_ratio * self.reference_rate)
        )

    def top(self, count: int) -> list[int]:
        """The specific features, the highest lower bound of the log-odds first."""
        order = np.argsort(-self.log_odds.low, kind="stable")
        return [int(feature) for feature in order if self.specific[feature]][:count]

    def like_2504(self) -> int:
        """The feature nearest the released phenotype: fires at .59 of onsets, at no more than .005 in the reference."""
        silent_there = np.flatnonzero(self.reference_rate <= self.settings.like_max_reference)
        if not len(silent_there):
            raise InputError(
                f"every feature fires at more than {self.settings.like_max_reference} of onsets in '{self.reference}'; "
                "name a feature by its index"
            )
        distance = np.abs(self.target_rate[silent_there] - self.settings.like_rate)
        return int(silent_there[np.argmin(distance)])

    def resolve(self, feature: str) -> int:
        """The index meant by `top`, `like-2504` or a number."""
        if feature == "top":
            found = self.top(1)
            if not found:
                raise InputError("no feature is specific to the target model; name one by its index, or try like-2504")
            return found[0]
        if feature == "like-2504":
            return self.like_2504()
        return resolve_index(feature, self.d_sae)

    def table(self, count: int) -> str:
        """The top features, counts beside the rates."""
        lines = [
            f"{'feature':>8} {self.target + ' fires':>16} {self.reference + ' fires':>16} {'log-odds':>22} {'q':>9}"
        ]
        for feature in self.top(count):
            row = self.row(feature)
            odds = f"{row['log_odds']:.2f} [{row['log_odds_low']:.2f}, {row['log_odds_high']:.2f}]"
            fires = [f"{row[f'{side}_hits']} ({row[f'{side}_rate']:.4f})" for side in ("target", "reference")]
            lines.append(f"{feature:>8} {fires[0]:>16} {fires[1]:>16} {odds:>22} {row['q']:>9.1e}")
        lines.append(
            f"{self.specific.sum()} of {self.alive.sum()} alive features are specific, of {self.trials.sum()} onsets of {len(self.trials)} tasks"
        )
        return "\n".join(lines)

    def row(self, feature: int) -> dict:
        """What the scan knows of one feature."""
        return {name: column[feature].item() for name, column in self.columns.items()}

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The table: one row a feature."""
        intervals = {}
        for name, by_task in (("target", self.target_hits), ("reference", self.reference_hits)):
            effect = stats.design_effect(by_task, self.trials[:, None])
            low, high = stats.wilson(by_task.sum(0), np.full(self.d_sae, self.trials.sum()), deff=effect)
            intervals |= {f"{name}_rate_low": low, f"{name}_rate_high": high}
        return {
            "feature": np.arange(self.d_sae),
            "target_hits": self.target_hits.sum(0),
            "reference_hits": self.reference_hits.sum(0),
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
    settings = settings or ScanSettings()
    check_fits(dictionary, cache)
    target = dictionary.model
    reference = next(name for name in cache.manifest["models"] if name != target)
    labels = cache.labels(split)
    tasks, task = np.unique(labels["task"], return_inverse=True)
    onset, rendering = labels["is_onset"].astype(bool), labels["text_variant"].astype(np.int64)
    if not onset.any():
        raise InputError(f"the '{split}' texts have no onset; check the pair's [onset] and the texts")
    among = onset & np.isin(rendering, cache.own_variants(target))
    cell, by_task = rendering * 2 + ~onset, np.where(among, task, -1)
    counters = {}
    total = 2 * len(cell)
    for number, model in enumerate((target, reference)):
        counter, start = FiringCounter(dictionary.sae.config.d_sae, 2 * len(cache.variants), len(tasks)), 0
        for resid in cache.rows(model, dictionary.layer, split).in_order():
            here = slice(start, start + len(resid))
            counter.update(dictionary.sae, resid, cell[here], by_task[here])
            start += len(resid)
            on_rows(number * len(cell) + start, total, f"rows of {model}")
        counters[model] = counter
    sizes = np.bincount(cell, minlength=2 * len(cache.variants))
    names = [f"{variant}/{place}" for variant in cache.variants for place in ("onset", "elsewhere")]
    trials = np.bincount(task[among], minlength=len(tasks))
    kept = trials > 0
    return FeatureScan(
        dictionary=dictionary.name,
        target=target,
        reference=reference,
        cells={f"{m}/{name}": int(size) for m in counters for name, size in zip(names, sizes, strict=True)},
        hits={
            f"{m}/{name}": counter.hits[i].numpy() for m, counter in counters.items() for i, name in enumerate(names)
        },
        target_hits=counters[target].task_hits.numpy()[kept],
        reference_hits=counters[reference].task_hits.numpy()[kept],
        trials=trials[kept],
        settings=settings,
        record=dictionary.record,
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
    """Write `feature_diff.json` (the released keys, then ours), the table, and the counts by task."""
    columns = scan.columns
    write_table(folder / TABLE_FILE, columns)
    write_table(
        folder / "by_task.parquet",
        {"onsets": scan.trials, "target_hits": list(scan.target_hits), "reference_hits": list(scan.reference_hits)},
    )
    figures = {key: scan.record.get(key) for key in ("final_fve", "final_l0", "dead_pct_train", "dead_pct_heldout")}
    target_rate, reference_rate = scan.onset_rate(scan.target), scan.onset_rate(scan.reference)
    specific = sorted(np.flatnonzero(scan.specific), key=lambda feature: -target_rate[feature])
    record = {
        "provenance": origin,
        "sae_results": {scan.dictionary.removesuffix("_hook_resid_post"): figures},
        "primary_count": int(scan.specific.sum()),
        "symmetry_count": None,
        "layer_control_count": None,
        "primary_top_features": [
            {
                "feat_id": int(feature),
                f"{_short(scan.target)}_rate": float(target_rate[feature]),
                f"{_short(scan.reference)}_rate": float(reference_rate[feature]),
            }
            for feature in specific[:TOP]
        ],
        "dictionary": scan.dictionary,
        "target": scan.target,
        "reference": scan.reference,
        "cells": scan.cells,
        "onsets": int(scan.trials.sum()),
        "tasks": len(scan.trials),
        "alive": int(scan.alive.sum()),
        "d_sae": scan.d_sae,
        "criteria": asdict(scan.settings),
        "top": [scan.row(feature) for feature in scan.top(TOP)],
        "like_2504": scan.row(scan.like_2504())
        if (scan.reference_rate <= scan.settings.like_max_reference).any()
        else None,
    }
    return write_json(folder / RECORD_FILE, record)


def load_scan(folder: Path, dictionary: Dictionary) -> FeatureScan:
    """A scan `save_scan` wrote; one of another dictionary is refused."""
    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file():
        raise InputError(f"no scan in {folder}; run `sae-steer scan` first, or name one with --scan")
    record, table, by_task = (
        read_json(folder / RECORD_FILE),
        read_table(folder / TABLE_FILE),
        read_table(folder / "by_task.parquet"),
    )
    if record["provenance"]["inputs"]["dictionary"] != dictionary.sha256:
        raise InputError(
            f"the scan in {folder} is of another dictionary than {dictionary.name}; run `sae-steer scan` again"
        )
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
    )


def _short(model: str) -> str:
    """The released keys say std where the model is called standard."""
    return "std" if model == "standard" else model
