"""A `pair.toml`, read and written; `model_pair` says what its keys mean."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from sae_steer.arguments import nearest
from sae_steer.errors import InputError
from sae_steer.files import write_text

FILE = "pair.toml"
MODEL_KEYS = ("name", "model", "fused_qkv", "fused_gate_up")
"""What stands in the section of a model."""
KEYS = (
    "tokenizer",
    "context",
    "special_tokens",
    *(f"{role}.{key}" for role in ("reference", "target", "twin") for key in MODEL_KEYS),
    "target.phrases",
    "target.lenient",
    "onset.tokens",
    "onset.regex",
)
"""All that a pair.toml may say; below `provenance` stands whatever made the pair."""
FREE = "provenance"


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
            facts = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a TOML file ({error}); see the pair files in the README") from error
        except RecursionError as error:
            raise InputError(f"{path} is nested too deep; see the pair files in the README") from error
        for key in _dotted(facts):
            if key not in KEYS:
                raise InputError(f"{path} has {key}, which is no key of a pair file{_meant(key)}")
        return cls(path, facts)

    def has(self, section: str) -> bool:
        """Whether the file has a section of this name."""
        return section in self.facts

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
        if found is not None and (not isinstance(found, kind) or (kind is int and isinstance(found, bool))):
            raise InputError(f"{self.path} has {key} = {found!r}, which is no {kind.__name__}; correct it")
        return default if found is None else found

    def strings(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of strings at a dotted key."""
        found = self.value(key, list, None if default is None else list(default))
        if not all(isinstance(item, str) for item in found):
            raise InputError(f"{self.path} has {key} = {found!r}, which is no list of strings; correct it")
        return tuple(found)


def _dotted(facts: dict) -> Iterator[str]:
    """Every key of the file, `section.key` in a section, a section that should be none or is none by its own name."""
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    for name, value in facts.items():
        if name in sections and isinstance(value, dict):
            yield from (f"{name}.{key}" for key in value)
        elif name not in (*sections, FREE):
            yield name


def _meant(key: str) -> str:
    """How an error on an unknown key goes on: the place its name belongs to, or the nearest name."""
    last = key.rpartition(".")[2]
    homes = [known for known in KEYS if known.rpartition(".")[2] == last]
    if homes and homes[0] == last:
        return f"; {last} stands above the first [section]"
    if homes:
        return f"; {last} stands in {' or '.join(home.partition('.')[0] for home in homes)}"
    here = [known for known in KEYS if known.partition(".")[0] == key.partition(".")[0]] if "." in key else []
    return nearest(key, here or [*KEYS, *dict.fromkeys(known.partition(".")[0] for known in KEYS)])
