"""A scan on disk: the table of features, the counts by task, and the record with the released study's keys."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from scipy.sparse import csc_array, csr_array

from sae_steer.cache import ActivationCache
from sae_steer.dictionary import Dictionary
from sae_steer.errors import InputError
from sae_steer.outputs import writing
from sae_steer.records import Facts, hashes_of, provenance, read_json, read_record, read_table, write_json, write_table
from sae_steer.row_filter import LeftOut
from sae_steer.scan.features import FeatureScan
from sae_steer.settings import ScanSettings
from sae_steer.shapes import Count, Provenance

RECORD_FILE, TABLE_FILE, BY_TASK_FILE = "feature_diff.json", "features.parquet", "by_task.parquet"
FILES = (RECORD_FILE, TABLE_FILE, BY_TASK_FILE)
TOP = 20
"""Features listed in the record."""


class ScanRecord(TypedDict):
    """What is read back of `feature_diff.json`; the released study's record has this name too, and no provenance."""

    provenance: Provenance
    dictionary: str
    target: str
    reference: str
    cells: dict[str, Count]
    d_sae: Count
    criteria: ScanSettings
    rows_left_out: NotRequired[dict | None]


def scan_provenance(cache: ActivationCache, dictionary: Dictionary, settings: ScanSettings) -> dict:
    """What fixes a scan's result."""
    return provenance(
        settings=settings,
        inputs={
            "cache": cache.sha256,
            "dictionary": dictionary.sha256,
            "rows": cache.row_filter.identity,
        },
    )


def save_scan(scan: FeatureScan, folder: Path, origin: Mapping) -> Path:
    """Write the table, the counts by task, and `feature_diff.json`: the released keys, then ours.

    The record is removed first and written last, so a folder that has one is whole.
    """
    folder = Path(folder)
    with writing(folder, FILES):
        return _save(scan, folder, origin)


def _save(scan: FeatureScan, folder: Path, origin: Mapping) -> Path:
    (folder / RECORD_FILE).unlink(missing_ok=True)
    write_table(folder / TABLE_FILE, scan.columns)
    by_task = {"onsets": scan.trials, **_lists("target", scan.target_hits), **_lists("reference", scan.reference_hits)}
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
        "rows_left_out": scan.left_out and scan.left_out.record(),
        "criteria": asdict(scan.settings),
        "files": hashes_of(folder, (TABLE_FILE, BY_TASK_FILE)),
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
    record = read_record(folder / RECORD_FILE, ScanRecord, "run `sae-steer scan --force`")
    if record["provenance"]["inputs"]["dictionary"] != dictionary.sha256:
        raise InputError(
            f"the scan in {folder} is of another dictionary than {dictionary.name}; run `sae-steer scan` again"
        )
    table, by_task = (read_table(folder / name, of=record) for name in (TABLE_FILE, BY_TASK_FILE))
    return FeatureScan(
        dictionary=record["dictionary"],
        target=record["target"],
        reference=record["reference"],
        cells=record["cells"],
        hits={name.removeprefix("hits/"): column for name, column in table.items() if name.startswith("hits/")},
        target_hits=_hits("target", by_task, record["d_sae"]),
        reference_hits=_hits("reference", by_task, record["d_sae"]),
        trials=by_task["onsets"],
        settings=ScanSettings(**record["criteria"]),
        record=dictionary.record,
        stability=dictionary.stability,
        left_out=LeftOut(**record["rows_left_out"]) if record.get("rows_left_out") else None,
    )


def _lists(side: str, hits: csc_array) -> dict[str, list[np.ndarray]]:
    """Two columns of the table by task: the features that fire in each task, and how often."""
    rows = csr_array(hits)
    rows.sort_indices()
    cuts = rows.indptr[1:-1]
    return {
        f"{side}_features": np.split(rows.indices.astype(np.int32), cuts),
        f"{side}_counts": np.split(rows.data.astype(np.int32), cuts),
    }


def _hits(side: str, by_task: Facts, d_sae: int) -> csc_array:
    """[task, d_sae] what `_lists` wrote, or what scans before it did: every count of every task."""
    if f"{side}_hits" in by_task:
        return csc_array(np.stack(list(by_task[f"{side}_hits"])).astype(np.int32))
    features, counts = by_task[f"{side}_features"], by_task[f"{side}_counts"]
    try:
        starts = np.cumsum([0, *map(len, features)])
        parts = (np.concatenate(list(counts)), np.concatenate(list(features)), starts)
        return csc_array(csr_array(parts, shape=(len(features), d_sae)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{by_task.path} is no table of counts ({error}); run `sae-steer scan --force`") from error


def tells_stability(folder: Path, scan: FeatureScan) -> bool:
    """Whether the saved scan has the stability its dictionary has now: seeds may have been learned since."""
    return read_json(Path(folder) / RECORD_FILE).get("seed_stability") == (scan.stability and scan.stability.sha256)


def _short(model: str) -> str:
    """The released keys say std where the model is called standard."""
    return "std" if model == "standard" else model
