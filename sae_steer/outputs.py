"""Folders that commands write into: one writer at a time, and nothing replaced but what this package made.

1. A writer holds the folder's lock, a file `.sae_steer` in it. The system frees it when the process ends, however
   it ends. Within one thread it may be taken again; anybody else is refused.
2. Before a file is written its name is claimed: added to the lock's file, one name a line. What has a claimed name
   was made here and may be replaced. A file in the way that nobody claimed is somebody else's: refused, or with
   `force` put aside as NAME.old. Nothing else in the folder is touched.
3. A folder from before there were claims counts as ours if one of the files in the way says so: a record with our
   provenance, a checkpoint with our facts, a page of ours.
4. What replaces a whole output leaves a line when it begins and when it has ended, so that one that was killed is
   gone on with, and not begun once more, when the same command comes again.
"""

import errno
import json
import os
import stat
import struct
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from sae_steer.errors import InputError, SteerError
from sae_steer.files import cannot_write, leftovers, sha256, sweep

try:
    import fcntl
except ImportError:  # not on this system: msvcrt locks there
    fcntl = None

LEDGER = ".sae_steer"
"""The file in a folder that is its lock and the list of what was made there."""
FIRST_LINE = "sae_steer: who writes here holds this file; below, what was made here"
ASIDE = ".old"
"""Added to the name of what somebody else made, where `force` puts it out of the way."""
_PAGE = b"sae_steer report"
_LOCKED_AT = 1 << 30
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)

_held = threading.local()


@dataclass
class Output:
    """A folder this thread may write into, until the `writing` block ends that gave it."""

    folder: Path
    ledger: FileIO
    _lines: list[str] = field(default_factory=list)

    def claim(self, names: Collection[str], *, force: bool = False) -> None:
        """Take these paths, relative to the folder, for what is written next, and sweep what a kill left of them.

        What somebody else made is an `InputError`, or put aside with `force`.
        """
        new = [name for name in dict.fromkeys(names) if name not in self._lines]
        in_the_way = [name for name in new if self._is_there(name)]
        if in_the_way and not any(is_ours(self.folder / name) for name in in_the_way):
            if not force:
                raise InputError(
                    f"{self.folder / in_the_way[0]} was not made by sae-steer, and would be replaced; choose another "
                    f"--out, or --force to put it aside as {Path(in_the_way[0]).name}{ASIDE}"
                )
            for name in in_the_way:
                _put_aside(self.folder / name)
        self._add(new)
        for name in names:
            sweep(self.folder / name)

    def made(self, pattern: str) -> list[Path]:
        """What was claimed here and matches the pattern, if it is there."""
        return [
            self.folder / name for name in self._lines if Path(name).match(pattern) and (self.folder / name).exists()
        ]

    def starts_over(self, wanted: Mapping, *, force: bool) -> bool:
        """Whether what is there is to be made anew: `force`, unless a forced run of this provenance was cut off."""
        return force and self._last_run != f"begun {_identity(wanted)}"

    def begun(self, wanted: Mapping) -> None:
        """Say that what was there is gone, and that what comes is a run of this provenance."""
        self._add([f"begun {_identity(wanted)}"])

    def ended(self, wanted: Mapping) -> None:
        """Say that the run of this provenance has come to its end."""
        if self._last_run == f"begun {_identity(wanted)}":
            self._add([f"ended {_identity(wanted)}"])

    @property
    def _last_run(self) -> str | None:
        return next((line for line in reversed(self._lines) if line.startswith(("begun ", "ended "))), None)

    def _is_there(self, name: str) -> bool:
        path = self.folder / name
        for parent in path.parents:
            if parent == self.folder:
                break
            if parent.is_symlink():
                raise InputError(f"{parent} is a link that leads elsewhere; choose another --out, or remove it")
        return path.exists() or path.is_symlink()

    def _add(self, lines: Collection[str]) -> None:
        if lines:
            _written(self.folder, self.ledger, "".join(f"{line}\n" for line in lines))
            self._lines.extend(lines)


def _identity(wanted: Mapping) -> str:
    return sha256(json.dumps([wanted["settings"], wanted["inputs"]], sort_keys=True).encode())[:16]


@contextmanager
def writing(folder: Path, names: Collection[str] = (), *, force: bool = False) -> Iterator[Output]:
    """The folder, made if need be and held by this thread alone, with `names` claimed.

    A second writer, a folder that cannot be written and a file of somebody else in the way are told in one line.
    """
    folder = Path(folder)
    own: dict[Path, Output] = _held.__dict__.setdefault("outputs", {})
    key = Path(os.path.abspath(folder))
    if key in own:
        own[key].claim(names, force=force)
        yield own[key]
        return
    with _opened(folder) as file:
        own[key] = Output(folder, file, _read(folder, file))
        try:
            own[key].claim(names, force=force)
            yield own[key]
        finally:
            del own[key]


def tidy(folder: Path, names: Collection[str]) -> None:
    """Sweep what a kill after the last record left of `names` in a finished output, unless somebody writes there."""
    if any(leftovers(Path(folder) / name) for name in names):
        with suppress(SteerError), writing(folder, names):
            pass


@contextmanager
def _opened(folder: Path) -> Iterator[FileIO]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        file = FileIO(os.open(folder / LEDGER, flags, 0o666), "r+")
    except OSError as error:
        if error.errno == errno.ELOOP or (folder / LEDGER).is_symlink():
            raise InputError(f"{folder / LEDGER} is a link that leads elsewhere; remove it") from error
        raise cannot_write(folder, error) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{folder / LEDGER} is no file; remove it")
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _BUSY:
                raise SteerError(
                    f"another process is writing into {folder}; wait for it, or use another --out"
                ) from error
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                raise cannot_write(folder, error) from error  # else: a file system that has no locks
        yield file


def _lock(file: FileIO) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    file.seek(_LOCKED_AT)  # nobody may read what is locked
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _read(folder: Path, file: FileIO) -> list[str]:
    """The lines of a ledger, a new one's first line written; a last line that a kill cut short does not count."""
    file.seek(0)
    content = file.readall()
    if not content:
        _written(folder, file, f"{FIRST_LINE}\n")
        return []
    first, *lines = content.decode("utf-8", "replace").split("\n")
    if not FIRST_LINE.startswith(first) or (lines and first != FIRST_LINE):
        raise InputError(f"{folder / LEDGER} was not made by sae-steer; choose another --out, or remove it")
    if not content.endswith(b"\n"):
        _written(folder, file, f"{FIRST_LINE[len(first) :]}\n" if not lines else "\n")
    return [line for line in lines[:-1] if line]


def _written(folder: Path, file: FileIO, text: str) -> None:
    try:
        file.write(text.encode())
        os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(folder, error) from error


def _put_aside(path: Path) -> None:
    aside = path.with_name(path.name + ASIDE)
    number = 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}{ASIDE}{number}")
    try:
        path.rename(aside)
    except OSError as error:
        raise cannot_write(path, error) from error


def is_ours(path: Path) -> bool:
    """Whether a file says of itself that this package made it."""
    try:
        if not path.is_file() or path.is_symlink():
            return False
        if path.suffix == ".json":
            return _says_so(json.loads(path.read_text(encoding="utf-8")))
        with open(path, "rb") as file:
            if path.suffix == ".safetensors":
                (length,) = struct.unpack("<Q", file.read(8))
                return "facts" in json.loads(file.read(min(length, 1 << 26))).get("__metadata__", {})
            return path.suffix == ".html" and _PAGE in file.read(1 << 16)
    except (OSError, ValueError, RecursionError, AttributeError, struct.error):
        return False


def _says_so(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    metadata = record.get("metadata")
    made = record.get("provenance", metadata.get("sae_steer") if isinstance(metadata, dict) else None)
    return isinstance(made, dict) and ("sae_steer" in made or "settings" in made)
