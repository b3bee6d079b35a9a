"""A `pair.toml`, read and written; `model_pair` says what its keys mean."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from sae_steer.errors import InputError
from sae_steer.files import write_text

FILE = "pair.toml"


def write_pair_toml(folder: Path, facts: dict) -> Path:
    """Write `facts` (the keys of `model_pair`'s docstring) as the folder's `pair.toml`."""
    return write_text(Path(folder) / FILE, tomli_w.dumps(facts))


@dataclass(frozen=True)
class PairFile:
    """A `pair.toml` as read; a key that is missing, or holds another kind of value, is an `InputError` naming it."""

    path: Path
    facts: dict

    @classmethod
    def read(cls, path: Path) -> "PairFile":
        """The file at `path`."""
        try:
            return cls(path, tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a TOML file ({error}); see the pair files in the README") from error

    @property
    def folder(self) -> Path:
        """What the file's relative paths are relative to."""
        return self.path.parent

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """The value at a dotted key; without a default the key must be there."""
        found: Any = self.facts
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None and default is None:
            raise InputError(f"{self.path} has no {key}; see the pair files in the README")
        if found is not None and not isinstance(found, kind):
            raise InputError(f"{self.path} has {key} = {found!r}, which is no {kind.__name__}; correct it")
        return default if found is None else found

    def strings(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of strings at a dotted key."""
        found = self.value(key, list, None if default is None else list(default))
        if not all(isinstance(item, str) for item in found):
            raise InputError(f"{self.path} has {key} = {found!r}, which is no list of strings; correct it")
        return tuple(found)
