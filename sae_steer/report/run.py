"""What a run folder holds: the records its commands wrote, read once; any of them may be missing."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_steer.errors import InputError
from sae_steer.records import read_json, read_table
from sae_steer.sae.saelens.files import CONFIG_FILE, WEIGHTS_FILE, identity
from sae_steer.study.plan import check_unedited
from sae_steer.study.record import Study, read_study

Record = Mapping[str, Any]

# (the command, the keys its record must have)
TRAINING = (
    "train-sae",
    ("provenance", "model", "layer", "final_fve", "final_l0", "dead_pct_train", "dead_pct_heldout"),
)
SCAN = ("scan", ("provenance", "dictionary", "target", "reference", "cells", "onsets", "tasks", "criteria", "top"))
STUDY = "intervene --feature top"
ATLAS = (
    "intervene --all-specific",
    ("provenance", "pair", "target_tokens", "target", "reference", "bound", "gap", "variants", "features"),
)
LAYERS = ("layers", ("provenance", "pair", "target_tokens", "curves", "tuned_lens", "patching"))
HEADS = ("heads", ("provenance", "pair", "summary", "matches", "centred", "broadcast", "ablations"))
LISTED = 12
"""Rows of the atlas that the page tables."""


@dataclass(frozen=True)
class DictionaryRecord:
    """How a dictionary came out."""

    name: str
    """Its folder."""
    record: Record
    weights: str | None
    """The hash of its config and weights, by which scans and studies name it."""


@dataclass(frozen=True)
class StudyFolder:
    """One direction's interventions, by the name of their folder."""

    name: str
    study: Study

    @property
    def inputs(self) -> Mapping[str, str]:
        """The hashes of what the study was made from."""
        return (self.study.provenance or {}).get("inputs", {})


@dataclass(frozen=True)
class RunRecords:
    """Every record found in a run folder."""

    name: str
    dictionaries: tuple[DictionaryRecord, ...]
    scan: Record | None
    features: Mapping[str, np.ndarray] | None
    """The scan's table, one row a feature."""
    studies: tuple[StudyFolder, ...]
    layers: Record | None
    atlas: Record | None = None
    atlas_table: Mapping[str, np.ndarray] | None = None
    """One row a feature and variant."""
    heads: Record | None = None

    @classmethod
    def read(cls, run: Path) -> "RunRecords":
        """The records in `run`; none at all is an `InputError`."""
        run, table, atlas = Path(run), Path(run) / "scan" / "features.parquet", Path(run) / "intervene" / "atlas"
        scanned, mapped = _read(run / "scan" / "feature_diff.json", SCAN), _read(atlas / "atlas.json", ATLAS)
        records = cls(
            name=Path(os.path.abspath(run)).name,
            dictionaries=tuple(
                DictionaryRecord(path.parent.name, _read(path, TRAINING), _identity(path.parent))
                for path in sorted(run.glob("saes/*/training.json"))
            ),
            scan=scanned,
            features=read_table(table, of=scanned) if table.is_file() else None,
            studies=tuple(_studies(run)),
            layers=_read(run / "layers" / "layers.json", LAYERS),
            atlas=mapped,
            atlas_table=read_table(atlas / "atlas.parquet", of=mapped) if mapped else None,
            heads=_read(run / "heads" / "heads.json", HEADS),
        )
        every = (records.dictionaries, records.scan, records.studies, records.layers, records.atlas, records.heads)
        if not any(every):
            raise InputError(
                f"no record in {run}; run `sae-steer train-sae`, `scan` and `intervene` first, or name a run folder"
            )
        return records

    @property
    def pair(self) -> str | None:
        """The pair's name, if a record tells it."""
        of_studies = [folder.study.pair for folder in self.studies if folder.study.pair]
        return next(iter([*of_studies, *(part["pair"] for part in (self.atlas, self.layers) if part)]), None)

    @property
    def missing(self) -> list[tuple[str, str]]:
        """(what is not there, the command that makes it)."""
        parts = [
            ("no dictionary", "train-sae", not self.dictionaries),
            ("no scan of the features", "scan", not self.scan),
            ("no table of all scanned features", "scan --force", self.scan and self.features is None),
            ("no feature was intervened on", STUDY, not self.studies),
            ("no curves over the layers", "layers", not self.layers),
        ]
        return [(what, f"sae-steer {command}") for what, command, absent in parts if absent]

    @property
    def studied_here(self) -> dict[int, str]:
        """What became of the features whose index belongs to the scanned dictionary."""
        scanned = self.scan["provenance"]["inputs"]["dictionary"] if self.scan else None
        return {
            folder.study.feature: "intervened on" if folder.study.tested else "not tested"
            for folder in self.studies
            if folder.inputs.get("dictionary") == scanned and folder.study.feature is not None
        }

    @property
    def furthest(self) -> list[Record]:
        """The atlas's effects that stand out of the control directions most, whatever their size."""
        rows = self.atlas["features"] if self.atlas else []
        ranked = [row for row in rows if row["q"] is not None]
        return sorted(ranked, key=lambda row: (row["q"], -abs(row["mean"])))[:LISTED]

    @property
    def named(self) -> list[tuple[str, Record]]:
        """(path inside the run folder, record) of all."""
        return [
            *((f"saes/{folder.name}/training.json", folder.record) for folder in self.dictionaries),
            *([("scan/feature_diff.json", self.scan)] if self.scan else []),
            *((f"intervene/{folder.name}/results.json", folder.study.record()) for folder in self.studies),
            *([("intervene/atlas/atlas.json", self.atlas)] if self.atlas else []),
            *([("layers/layers.json", self.layers)] if self.layers else []),
            *([("heads/heads.json", self.heads)] if self.heads else []),
        ]

    @property
    def mixed(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """(input, [(record, hash)]) where records were made from different ones."""
        differing = []
        for kind in ("pair", "cache", "dictionary"):
            every = [(path, record["provenance"]["inputs"].get(kind)) for path, record in self.named]
            hashes = [(path, value) for path, value in every if value]
            if len({value for _, value in hashes}) > 1:
                differing.append((kind, hashes))
        return differing


def _studies(run: Path) -> Iterator[StudyFolder]:
    for path in sorted(run.glob("intervene/*/results.json"), key=lambda path: (len(str(path)), path)):
        study = read_study(path)
        check_unedited(path.parent, study.plan and study.plan.hash)
        yield StudyFolder(path.parent.name, study)


def _read(path: Path, kind: tuple[str, tuple[str, ...]]) -> Record | None:
    if not path.is_file():
        return None
    record = read_json(path)
    _check_keys(path, record, kind[1], kind[0])
    return record


def _check_keys(path: Path, record: Any, keys: tuple[str, ...], command: str) -> None:
    lacking = [key for key in keys if not isinstance(record, dict) or key not in record]
    if lacking:
        raise InputError(
            f"{path} lacks {lacking[0]!r}; it was written by another version, run `sae-steer {command} --force`"
        )


def _identity(folder: Path) -> str | None:
    return identity(folder) if (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file() else None
