"""What results leave on disk: JSON records with their provenance, tidy tables as Parquet, timings apart.

A record names the package version, commit, settings and the hashes of its inputs. A command finds its
finished output again by them: the same settings and inputs, it is reused; others, it is refused.
"""

import dataclasses
import json
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sae_steer.errors import InputError, StaleError
from sae_steer.files import replacing, write_text


def provenance(*, settings: Any, inputs: Mapping[str, str]) -> dict:
    """Where a record comes from: version, commit, settings, and the hash of every input."""
    known = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else dict(settings)
    return json.loads(
        json.dumps({"sae_steer": package_version(), "commit": commit(), "settings": known, "inputs": dict(inputs)})
    )


@cache
def package_version() -> str:
    """The installed version of this package."""
    try:
        return version("sae-steer")
    except PackageNotFoundError:
        return "not installed"


@cache
def commit() -> str | None:
    """The git commit of the checkout this package runs from, `-dirty` if its code differs; None for a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    ask = {"cwd": root, "capture_output": True, "text": True, "check": False}
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno", "--", "sae_steer"], **ask).stdout.strip()
    except OSError:  # a checkout on a machine without git
        return None
    return (found + ("-dirty" if changed else "")) or None


def write_json(path: Path, record: Any) -> Path:
    """Write a record (dataclasses welcome) as JSON; NaN and infinity are programming errors."""
    return write_text(path, json.dumps(record, indent=1, allow_nan=False, default=_plain) + "\n")


def read_json(path: Path) -> Any:
    """A record read back, or an `InputError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole record ({error}); write it again with --force") from error


def write_table(path: Path, columns: Mapping[str, Any], more: Iterable[Mapping[str, Any]] = ()) -> Path:
    """Write equally long columns as a Parquet table.

    Args:
        more: further rows of the same columns, a part at a time, so that they need not be in memory together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = pa.table(dict(columns))
    with replacing(path) as scratch, pq.ParquetWriter(scratch, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for part in more:
            writer.write_table(pa.table(dict(part), schema=first.schema))
    return Path(path)


def read_table(path: Path, where: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The columns of a Parquet table, as numpy arrays.

    Args:
        where: {column: value} that the rows read must have.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, filters=[(name, "==", value) for name, value in (where or {}).items()] or None)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a whole table ({error}); write it again with --force") from error
    return {name: table.column(name).to_numpy() for name in table.column_names}


def already_done(path: Path, wanted: dict, *, force: bool = False) -> bool:
    """Whether the record at `path` was made with the settings and inputs of `wanted`.

    A record made otherwise is a `StaleError` that names the first difference, unless `force`.
    """
    if force or not Path(path).is_file():
        return False
    record = read_json(path)
    found = record.get("provenance") if isinstance(record, dict) else None
    if not isinstance(found, dict):
        raise StaleError(f"{path} does not say what it was made from; choose another --out, or --force to replace it")
    difference = first_difference(found, wanted, parts=("sae_steer", "settings", "inputs"))
    if difference:
        raise StaleError(
            f"{path} was made with other inputs ({difference}); choose another --out, or --force to replace it"
        )
    return True


def first_difference(found: dict, wanted: dict, *, parts: tuple[str, ...]) -> str | None:
    """The first thing in these parts, values or tables of values, that is not as wanted; None if all is."""
    for part in parts:
        old, new = found.get(part), wanted.get(part)
        if isinstance(old, dict) and isinstance(new, dict):
            for key in {**old, **new}:
                if old.get(key) != new.get(key):
                    return f"{key}: {_short(old.get(key))}, now {_short(new.get(key))}"
        elif old != new:
            return f"{part}: {_short(old)}, now {_short(new)}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + "..."


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()  # numpy and torch, scalars and arrays
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}")
