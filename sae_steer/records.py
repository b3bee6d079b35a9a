"""What results leave on disk: JSON records with their provenance, tidy tables as Parquet, timings apart.

A record names the package version, commit, settings and the hashes of its inputs. A command finds its
finished output again by them: the same settings and inputs, it is reused; others, it is refused.
"""

import dataclasses
import json
import math
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from sae_steer.errors import InputError, MissingError, StaleError
from sae_steer.files import replacing, sha256, write_text
from sae_steer.outputs import is_ours
from sae_steer.shapes import Hash, conform

SEAL = "seal"
"""The key under which a record has the hash of its content."""


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
    """Write a record (dataclasses welcome) as JSON; NaN and infinity are programming errors.

    One with a provenance is sealed: a hash of its content stands in it, and `read_json` checks it.
    """
    text = json.dumps(record, indent=1, allow_nan=False, default=_plain)
    if isinstance(plain := json.loads(text), dict) and "provenance" in plain:
        text = json.dumps({**plain, SEAL: seal_of(plain)}, indent=1)
    return write_text(path, text + "\n")


def seal_of(record: Mapping[str, Any]) -> str:
    """The hash of a record's content, however the file is laid out."""
    content = {key: value for key, value in record.items() if key != SEAL}
    return sha256(json.dumps(content, sort_keys=True).encode())


class Facts(dict):
    """An object of a record; a key that it lacks is an `InputError` that names the file."""

    path: Path | None = None

    def __missing__(self, key: object) -> Any:
        raise MissingError(
            f"{self.path} lacks {key!r}; it was written by another version or by hand, write it again with --force"
        )


def read_json(path: Path) -> Any:
    """A record read back, without its seal; one that is not whole or was changed is an `InputError` that names it."""
    path = Path(path)

    def facts(content: dict) -> Facts:
        named = Facts(content)
        named.path = path
        return named

    try:
        content = path.read_text(encoding="utf-8")
        record = json.loads(content, object_hook=facts, parse_constant=_not_finite, parse_float=_finite)
        if "\\ud" in content.lower():
            json.dumps(record, ensure_ascii=False).encode()  # half a character can be neither shown nor stored
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) or "too deep"
        raise InputError(f"{path} is not a whole record ({reason}); write it again with --force") from error
    if isinstance(record, dict) and SEAL in record and record.pop(SEAL) != seal_of(record):
        raise InputError(f"{path} was changed after it was written; write it again with --force")
    return record


def read_record(path: Path, kind: Any, advice: str = "write it again with --force") -> Any:
    """A record of the type `kind`, a `TypedDict`; one of another shape is an `InputError` that names the place."""
    record = read_json(path)
    try:
        conform(record, kind, str(path))
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    return record


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _not_finite(digits)


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


def hashes_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: hash} of the files beside a record, for its key `files`; `read_table` checks them."""
    return {name: sha256(Path(folder) / name) for name in names}


def check_files(path: Path) -> None:
    """Raise `InputError` if a file is not the one that the record at `path`, where there is one of ours, names.

    Its key `files` has {path beside it: hash}.
    """
    path = Path(path)
    if not path.is_file() or not is_ours(path):
        return
    for name, wanted in read_record(path, Listing).get("files", {}).items():
        if not (path.parent / name).is_file() or sha256(path.parent / name) != wanted:
            raise InputError(
                f"{path.parent / name} is not the file that {path.name} was written with: it is missing, damaged or "
                f"changed; put it back, make it anew with --force, or remove {path.name} to use it as it is"
            )


class Listing(TypedDict):
    """A record and the hashes of the files beside it."""

    files: NotRequired[dict[str, Hash]]


def read_table(
    path: Path, where: Mapping[str, Any] | None = None, *, of: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The columns of a Parquet table, as numpy arrays.

    Args:
        where: {column: value} that the rows read must have.
        of: the record the table stands beside; where that knows the table's hash, another one is an `InputError`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, hashes = Path(path), (of or {}).get("files")
    try:
        if isinstance(hashes, dict) and path.name in hashes and sha256(path) != hashes[path.name]:
            raise InputError(f"{path} is not the table its record was written with; write it again with --force")
        table = pq.read_table(path, filters=[(name, "==", value) for name, value in (where or {}).items()] or None)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a whole table ({error}); write it again with --force") from error
    columns = Facts({name: table.column(name).to_numpy() for name in table.column_names})
    columns.path = path
    return columns


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
