"""What a run needs at the very least, before any of it begins: sizes that no machine here can hold or end are refused.

The estimates are lower bounds (weights and moments alone, the fastest arithmetic a machine could do), so that nothing
that could run is refused.
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from sae_steer.errors import InputError

LONGEST = 7 * 24 * 3600
"""Seconds that a run may take by the most hopeful estimate."""
PER_CORE, PER_GPU = 1e12, 5e14
"""Operations a second, at best."""
PER_ROW = 1e-7
"""Seconds in which a row can be read, at best."""
PER_TOKEN = 1e-6
"""Seconds in which a token of a text can be made and read, at best."""
SHORTEST_TEXT = 20
"""Tokens that a text of the corpus has at least."""


@dataclass(frozen=True)
class Need:
    """Lower bounds of what something takes."""

    what: str
    mend: str
    """What the user can do about it."""
    memory: int | float = 0
    """Bytes on the device."""
    disk: int | float = 0
    """Bytes in the folder written to."""
    operations: int | float = 0
    seconds: int | float = 0
    """Besides the operations."""

    def check(self, device: torch.device, folder: Path | None = None) -> None:
        """Raise `InputError` where the device, the disk or a week is too small."""
        seconds = self.seconds + self.operations / _speed(device)
        if self.memory > (there := _memory(device)):
            raise InputError(
                f"{self.what} needs {_bytes(self.memory)} at least, and {_bytes(there)} are there; {self.mend}"
            )
        if folder is not None and self.disk > (free := _free(folder)):
            raise InputError(f"{self.what} needs {_bytes(self.disk)} of disk, and {_bytes(free)} are free; {self.mend}")
        if seconds > LONGEST:
            raise InputError(f"{self.what} would take {seconds / 86_400:,.0f} days at the very best; {self.mend}")


def dictionaries(sizes: list[tuple[int, int]], rows: int, batch_size: int) -> Need:
    """Learning dictionaries of these (d_in, d_sae) together: weights and two moments each, every row through each."""
    numbers = sum(d_sae * (2 * d_in + 1) for d_in, d_sae in sizes)
    widest = max(d_sae for _, d_sae in sizes)
    return Need(
        f"learning {len(sizes)} of up to {widest:,} features from {rows:,} rows",
        "ask for fewer features with --d-sae, or fewer rows with --rows",
        memory=12 * numbers + 2 * batch_size * widest,
        operations=2 * rows * sum(d_in * d_sae for d_in, d_sae in sizes),
        seconds=rows * PER_ROW,
    )


def streams(texts: int, bytes_a_token: int) -> Need:
    """Caching the streams of so many generated texts."""
    tokens = texts * SHORTEST_TEXT
    return Need(
        f"a cache of {texts:,} generated texts",
        "ask for fewer plans",
        disk=tokens * bytes_a_token,
        seconds=tokens * PER_TOKEN,
    )


def models(parameters: int, tokens: int) -> Need:
    """Training a model of so many parameters on so many tokens."""
    return Need(
        f"training on {tokens:,} tokens a model",
        "ask for fewer with --tokens",
        operations=6 * parameters * tokens,
        seconds=tokens * PER_ROW,
    )


def _speed(device: torch.device) -> float:
    return PER_CORE * (os.cpu_count() or 1) if device.type == "cpu" else PER_GPU


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free(folder: Path) -> int | float:
    """Free bytes where `folder` is or would be."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    if not os.access(there, os.W_OK):
        return math.inf  # nothing can be written there at all, and whoever tries says so
    return shutil.disk_usage(there).free


def _bytes(count: int | float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
