"""Files written beside and renamed into place, tensors and hashes."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from sae_steer.errors import SteerError

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
        reason = getattr(error, "strerror", None) or error
        raise SteerError(f"cannot write {path}: {reason}; free space or name a writable folder with --out") from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`; call it where no other process writes."""
    for left in Path(folder).glob(f".*{UNFINISHED}"):
        left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path`, beside and renamed; returns `path`."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return Path(path)


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict) -> Path:
    """Write named tensors, and `facts` as JSON in the header, as one safetensors file, beside and renamed."""
    from safetensors.torch import save_file

    with replacing(path) as scratch:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, {"facts": json.dumps(facts)}
        )
    return Path(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts `write_tensors` wrote."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise SteerError(f"{path} is not a whole checkpoint ({error}); delete it to start anew") from error


def read_facts(path: Path) -> dict:
    """The facts of such a file, without its tensors."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["facts"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
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
    """Writes how long the block took to `timing.json` in `folder`, and on what machine: apart from the records, which
    repeat exactly.
    """
    start = time.perf_counter()
    yield
    seconds = round(time.perf_counter() - start, 3)
    write_text(Path(folder) / "timing.json", json.dumps({"seconds": seconds, **machine}) + "\n")
