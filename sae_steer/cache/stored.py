"""Rows in a shard's file, read by position when they are used.

Reads and not a memory map: a file that is cut short while it is mapped ends the process by a signal, without a word.
Few files are kept open, because a cache may have more shards than a process may have open files.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np

from sae_steer.errors import InputError

KEPT_OPEN = 128
"""Shards at most that stay open between two reads."""
CHUNK = 4 << 20
"""Bytes that are read together where all rows are gone through."""
AGAIN = "repeat `sae-steer cache`, which writes it anew"


@dataclass(frozen=True)
class Stamp:
    """What a file's content is told by without reading it."""

    bytes: int
    modified: int
    """In nanoseconds."""
    number: int
    """Of the file in its file system."""

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """From what `os.stat` says."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class OpenFiles:
    """The files read last, open; each must still be the one that was stamped when it is opened again."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._files: OrderedDict[tuple[Path, Stamp], FileIO] = OrderedDict()
        self._lock = Lock()

    def read_into(self, path: Path, stamp: Stamp, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on; a file that is changed or cut short is an `InputError`."""
        with self._lock:
            try:
                file = self._opened(path, stamp)
                while len(buffer) and (count := _read_at(file, buffer, offset)):
                    buffer, offset = buffer[count:], offset + count
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from error
        if len(buffer):
            raise InputError(f"{path} was cut short while it was read; {AGAIN}")

    def _opened(self, path: Path, stamp: Stamp) -> FileIO:
        file = self._files.pop((path, stamp), None) or FileIO(path)
        if Stamp.of(os.fstat(file.fileno())) != stamp:
            file.close()
            raise InputError(f"{path} was changed while it was read; {AGAIN}")
        self._files[path, stamp] = file
        if len(self._files) > self.most:
            self._files.popitem(last=False)[1].close()
        return file


def _read_at(file: FileIO, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):  # one call into the system; not everywhere
        return os.preadv(file.fileno(), [buffer], offset)
    file.seek(offset)
    return file.readinto(buffer)


_FILES = OpenFiles(KEPT_OPEN)


@dataclass(frozen=True)
class StoredRows:
    """The rows of one contiguous dataset; what is asked for by `[...]` is read and is an array."""

    path: Path
    stamp: Stamp
    offset: int
    """Where the rows begin in the file."""
    shape: tuple[int, int]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill `out` with the rows from `start` on."""
        buffer = memoryview(out).cast("B") if out.size else memoryview(b"")
        _FILES.read_into(self.path, self.stamp, buffer, self.offset + start * self.row_bytes)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice, of a mask, or of their numbers, in that order."""
        if isinstance(rows, slice):
            start, stop, stride = rows.indices(len(self))
            if stride == 1:
                found = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
                self.read_into(found, start)
                return found
            rows = np.arange(start, stop, stride)
        rows = np.arange(len(self))[rows]
        found, each = np.empty((len(rows), *self.shape[1:]), self.dtype), self.rows_together
        for part in np.unique(rows // each):
            here = rows // each == part
            found[here] = self[part * each : (part + 1) * each][rows[here] - part * each]
        return found

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        every = self[:]
        return every if dtype is None else every.astype(dtype)

    @property
    def rows_together(self) -> int:
        """Rows that are read together where all are gone through."""
        return max(1, CHUNK // self.row_bytes)

    def are_finite(self) -> bool:
        """Whether no value is a NaN or an infinity."""
        starts = range(0, len(self), self.rows_together)
        return all(_all_finite(self[start : start + self.rows_together]) for start in starts)


def _all_finite(stored: np.ndarray) -> bool:
    """By the exponent's bits, which are all ones only there; bfloat16 lies in uint16."""
    exponent = {"uint16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}[stored.dtype.name]
    bits = stored.view(f"u{stored.dtype.itemsize}")
    return bool((bits & exponent).max(initial=0) < exponent)
