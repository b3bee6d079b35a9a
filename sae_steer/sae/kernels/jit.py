"""How the loops of `choosing` and `loops` are compiled.

What loops share is inlined: a library of its own is optimised otherwise when numba reads it from its cache than when
it has just compiled it, and a first run would then end in other bytes than a second.
"""

import os
import stat
import tempfile
from contextlib import suppress
from inspect import unwrap
from pathlib import Path

from numba import config, njit

REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""For `fastmath`: sums may be cut into lanes; NaN and infinity keep their meaning."""


def loop(**options):
    """`njit` of the function as written, without the shape checks that tests wrap around every function."""
    return lambda function: _compiled(unwrap(function), {"nogil": True, "error_model": "numpy", **options})


def shared(**options):
    """The same for what is inlined into loops."""
    return loop(inline="always", **options)


def _compiled(function, options: dict):
    """Kept for the next process where that can be: beside the source, in the home folder, else in a temporary one."""
    for cache_folder in (config.CACHE_DIR, _private_folder):
        with suppress(RuntimeError):  # numba finds no folder it may write
            config.CACHE_DIR = cache_folder() if callable(cache_folder) else cache_folder
            return njit(cache=True, **options)(function)
    return njit(**options)(function)


def _private_folder() -> str:
    """A folder for this user alone, because numba unpickles what it finds; none if the usual one is not ours."""
    folder = Path(tempfile.gettempdir()) / f"sae_steer-{os.getuid() if hasattr(os, 'getuid') else 'numba'}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        mine = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
        if stat.S_ISDIR(status.st_mode) and mine:
            return str(folder)
    raise RuntimeError("no folder for compiled code")
