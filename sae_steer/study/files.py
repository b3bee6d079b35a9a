"""A study's folder: its record, its trials, and the released study's files with what is known of their keys."""

from dataclasses import replace
from pathlib import Path

from sae_steer.outputs import writing
from sae_steer.records import hashes_of, read_json, read_table, write_json, write_table
from sae_steer.study.plan import PLAN_FILE
from sae_steer.study.record import Study, read_study
from sae_steer.study.released import deepdive_steering, three_probes

RECORD_FILE, TRIALS_FILE = "results.json", "trials.parquet"
RELEASED = {"deepdive_steering.json": deepdive_steering, "three_probes.json": three_probes}
FILES = (RECORD_FILE, TRIALS_FILE, *RELEASED, PLAN_FILE)
"""What a study's folder is made of."""


def save_study(study: Study, folder: Path) -> Path:
    """Write everything into `folder`; returns the path of `results.json`.

    The record is removed first and written last, so a folder that has one is whole.
    """
    folder = Path(folder)
    with writing(folder, FILES):
        for name in (RECORD_FILE, TRIALS_FILE, *RELEASED):
            (folder / name).unlink(missing_ok=True)
        if study.tested:
            write_table(folder / TRIALS_FILE, study.trials, (part.columns() for part in study.controls))
        for name, released in RELEASED.items():
            write_json(folder / name, released(study))
        tables = hashes_of(folder, [TRIALS_FILE] if study.tested else [])
        return write_json(folder / RECORD_FILE, {**study.record(), "files": tables})


def load_study(folder: Path) -> Study:
    """A study `save_study` wrote."""
    path = Path(folder) / RECORD_FILE
    study = read_study(path)
    if not study.tested:
        return study
    return replace(study, trials=read_table(path.with_name(TRIALS_FILE), {"family": ""}, of=read_json(path)))
