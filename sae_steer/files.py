"""Files written beside and renamed into place, tensors and hashes."""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError
from torch import Tensor, uint8

from sae_steer.errors import SteerError

TIMING_FILE = "timing.json"
UNFINISHED = ".tmp"
"""How the name of a file ends while it is written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed onto it, whole and synced, when the block ends well.

    A folder that cannot be written and a full disk become a `SteerError`, and `path` stays as it was. A killed
    process leaves its unfinished file; `sweep` removes it.
    """
    path = Path(path)
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
        os.close(handle)
        scratch = Path(name)
        yield scratch
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o666 & ~mask)  # mkstemp makes files private
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def cannot_write(path: Path, error: Exception) -> SteerError:
    """The one line of a folder or file that cannot be written."""
    reason = getattr(error, "strerror", None) or error
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None), None)
    return SteerError(f"cannot write {path}: {reason}; {'free space or ' * full}name a writable folder with --out")


def sweep(path: Path) -> None:
    """Remove what killed processes left of the file `path` unfinished; call it where no other process writes it."""
    for left in leftovers(path):
        left.unlink(missing_ok=True)


def leftovers(path: Path) -> list[Path]:
    """What unfinished files of `path` there are."""
    return list(path.parent.glob(f".{escape(path.name)}.*{UNFINISHED}"))


def open_to_append(path: Path) -> TextIO:
    """The file at `path`, open to be added to; a link there is not followed."""
    try:
        return os.fdopen(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666),
            "a",
            encoding="utf-8",
        )
    except OSError as error:
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path`, beside and renamed; returns `path`."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return Path(path)


_SEAL = "sha256"
"""The fact that is the hash of the tensors and of all other facts."""


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict) -> Path:
    """Write named tensors, and `facts` as JSON in the header, as one safetensors file, beside and renamed."""
    from safetensors.torch import save_file

    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sealed = json.dumps({**facts, _SEAL: hash_of(content, json.dumps(facts))})
    with replacing(path) as scratch:
        save_file(content, scratch, {"facts": sealed})  # one entry: safetensors writes several in a random order
    return Path(path)


def hash_of(tensors: dict[str, Tensor], facts: str = "") -> str:
    """The hash of named tensors, their types and shapes, and of what is said of them."""
    parts = [facts.encode()]
    for name, tensor in sorted(tensors.items()):
        parts.append(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        parts.append(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy()))
    return sha256(*parts)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts `write_tensors` wrote."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors, told = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        facts = json.loads(told["facts"])
        seal = facts.pop(_SEAL, told.get(_SEAL))
    except PermissionError as error:
        raise SteerError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    except (OSError, SafetensorError, TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
        raise SteerError(f"{path} is not a whole checkpoint ({error}); delete it to start anew") from error
    if seal is not None and seal != hash_of(tensors, json.dumps(facts)):
        raise SteerError(f"{path} is damaged: it does not have the checksum written in it; delete it to start anew")
    return tensors, facts


def read_facts(path: Path) -> dict:
    """The facts of such a file, without its tensors."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: value for name, value in facts.items() if name != _SEAL}
    except (OSError, SafetensorError, TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
        raise SteerError(f"{path} is not a whole checkpoint ({error}); delete it to start anew") from error


def sha256(*parts: bytes | memoryview | Path) -> str:
    """The hash of the parts one after another; a path stands for its file's content."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        else:
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def timed(folder: Path, **machine: str) -> Iterator[None]:
    """Writes how long the block took to `TIMING_FILE` in `folder`, and on what machine: apart from the records, which
    repeat exactly.
    """
    start = time.perf_counter()
    yield
    seconds = round(time.perf_counter() - start, 3)
    write_text(Path(folder) / TIMING_FILE, json.dumps({"seconds": seconds, **machine}) + "\n")
