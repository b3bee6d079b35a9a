"""Whether a shard is the one its manifest lists: there, of its length, of this cache, and every bit as written.

A shard is checked when a process first opens it, and again only when its size, time or file has changed: hashing
reads it from the disk once, which the rows then need not do.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os import cpu_count
from pathlib import Path

import h5py
import numpy as np

from sae_steer.cache.layout import LABELS, MOMENTS, NORMS, ORIGIN, origin, site
from sae_steer.cache.stored import AGAIN, Stamp, StoredRows
from sae_steer.errors import InputError, NotFiniteError
from sae_steer.files import sha256
from sae_steer.records import first_difference

DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError)
"""What h5py, numpy and json make of damage, depending on where it is."""
_seen: dict[tuple[Path, str], Stamp] = {}
"""{(shard, checksum): stamp} of what had this checksum when it was last read."""
_finite: set[tuple[Path, Stamp, str]] = set()
"""Datasets without a NaN or an infinity."""


def what_is_wrong(folder: Path, manifest: Mapping, line: Mapping) -> str | None:
    """What is wrong with the shard of a manifest's line, as a sentence that names it; None if nothing is."""
    path = folder / line["file"]
    if not path.is_file() or path.stat().st_size != line["bytes"]:
        return f"{path} is missing or cut short"
    damaged = f"{path} is damaged: it does not have the checksum of the manifest"
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    try:
        with h5py.File(path, "r") as file:
            wrong = stranger(file, manifest, line)
    except DAMAGE:
        return damaged
    return wrong or (None if _has_checksum(path, line["sha256"]) else damaged)


def damaged_shards(folder: Path, manifest: Mapping, lines: Sequence[Mapping]) -> list[str | None]:
    """`what_is_wrong` with each shard, on all cores."""
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as readers:
        return list(readers.map(lambda line: what_is_wrong(folder, manifest, line), lines))


def _has_checksum(path: Path, checksum: str) -> bool:
    stamp = Stamp.of(path.stat())
    if _seen.get((path, checksum)) != stamp:
        if sha256(path) != checksum:
            return False
        _seen[path, checksum] = stamp
    return True


@contextmanager
def opened(folder: Path, manifest: Mapping, line: Mapping) -> Iterator["Shard"]:
    """The shard of a manifest's line, checked; one that is not as it was written is an `InputError`."""
    path = folder / line["file"]
    if wrong := what_is_wrong(folder, manifest, line):
        raise InputError(f"{wrong}; " + ("make it readable" if "cannot be read" in wrong else AGAIN))
    stamp = _seen[path, line["sha256"]]
    try:
        with h5py.File(path, "r") as file:
            yield Shard(file, path, stamp, manifest, line)
    except DAMAGE as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:120]}); {AGAIN}") from error


class Shard:
    """An open shard; only data that lie in it as the manifest says are handed out."""

    def __init__(self, file: h5py.File, path: Path, stamp: Stamp, manifest: Mapping, line: Mapping) -> None:
        self._file, self._path, self._stamp = file, path, stamp
        self._rows, self._models, self._type = line["rows"], manifest["models"], manifest["dtype"]

    def label(self, name: str) -> np.ndarray:
        """A label of every row."""
        return self._data(name, (self._rows,), LABELS[name])[:]

    def moments(self, model: str, layer: int) -> np.ndarray:
        """[2, d_model] sums and sums of squares."""
        return self._data(f"{MOMENTS}/{model}/{site(layer)}", (2, self._models[model]["d_model"]), np.float64)[:]

    def norms(self, model: str, layer: int) -> np.ndarray | None:
        """[row] lengths of the rows of a model's stream; None in a shard from before shards had them."""
        if NORMS not in self._file:
            return None
        return self._data(f"{NORMS}/{model}/{site(layer)}", (self._rows,), np.float32)[:]

    def rows(self, model: str, layer: int) -> StoredRows:
        """A model's stream after a block; a value that is not finite is a `NotFiniteError`."""
        name, stored_as = f"{model}/{site(layer)}", "uint16" if self._type == "bfloat16" else self._type
        stored = self._data(name, (self._rows, self._models[model]["d_model"]), np.dtype(stored_as))
        found = StoredRows(self._path, self._stamp, stored.id.get_offset(), stored.shape, stored.dtype)
        known = self._path, self._stamp, name
        if known not in _finite and not found.are_finite():
            raise NotFiniteError(f"{self._path} holds rows of {name} that are not finite; write the cache anew")
        _finite.add(known)
        return found

    def _data(self, name: str, shape: tuple[int, ...], dtype: type | np.dtype) -> h5py.Dataset:
        """A data set that lies whole in this file: no link leads to it, and none of its bytes are elsewhere."""
        stored, parts = self._file[name], name.split("/")
        paths = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        if not all(isinstance(self._file.get(path, getlink=True), h5py.HardLink) for path in paths):
            raise ValueError(f"{name} is a link")
        if not isinstance(stored, h5py.Dataset) or stored.shape != shape or stored.dtype != dtype:
            raise ValueError(f"{name} is no {np.dtype(dtype).name} of shape {list(shape)}")
        if stored.external or stored.is_virtual or stored.chunks or stored.id.get_offset() is None:
            raise ValueError(f"{name} does not lie in one piece in this file")
        return stored


def stranger(file: h5py.File, manifest: Mapping, line: Mapping) -> str | None:
    """How an open shard shows that it is no part of the manifest's cache, or another part of it; None if it is not.

    A shard from before shards said so passes; its checksum must do.
    """
    wanted = {**origin(manifest), "file": line["file"]}
    found = json.loads(file.attrs.get(ORIGIN, "{}"))
    difference = found and first_difference(found, wanted, parts=tuple(wanted))
    return (
        f"{file.filename} is a shard of another cache, or of another place in this one ({difference})"
        if difference
        else None
    )
