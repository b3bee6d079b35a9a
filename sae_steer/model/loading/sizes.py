"""Counts, widths and numbers of a config: positive, or an error that names the key."""

from pathlib import Path

from sae_steer.errors import InputError


def size(path: Path, config: dict, name: str, otherwise: int | None = None) -> int:
    """The positive integer under `name`."""
    found = otherwise if config.get(name) is None else config[name]
    if found is None:
        raise InputError(f"{path} has no {name!r}; it is not a whole config")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InputError(f"{path} has {name} {found!r}, which is no positive integer; copy it again")
    return found


def number(path: Path, config: dict, name: str, otherwise: float) -> float:
    """The positive number under `name`."""
    value = config.get(name, otherwise)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"{path} has {name} {value!r}, which is no positive number; copy it again")
    return float(value)
