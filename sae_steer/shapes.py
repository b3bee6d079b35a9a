"""Whether what was read from a file has the shape its reader counts on, by the type that says so.

A record's type is a `TypedDict` beside its reader; `conform` walks value and type together and names the first place
where they differ. Keys a type does not name are let through: a later version may write more.
"""

import math
import re
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from typing import is_typeddict as _is_typed

from sae_steer.errors import InputError


@dataclass(frozen=True)
class Matches:
    """A rule for a string: the whole of it matches the pattern."""

    pattern: str
    called: str

    def __call__(self, value: Any) -> bool:
        """Whether the string keeps the rule."""
        return re.fullmatch(self.pattern, value) is not None


@dataclass(frozen=True)
class AtLeast:
    """A rule for a number."""

    least: int

    @property
    def called(self) -> str:
        """In words."""
        return f"a number from {self.least} on"

    def __call__(self, value: Any) -> bool:
        """Whether the number keeps the rule."""
        return value >= self.least


Count = Annotated[int, AtLeast(0)]
Hash = Annotated[str, Matches(r"[0-9a-f]{64}", "a SHA-256")]
Name = Annotated[str, Matches(r"(?!\.\.?$)[^/\\\x00-\x1f\x7f-\x9f]+", "a name without a path")]
"""What becomes a part of a path or of a data set's name."""


class Provenance(TypedDict):
    """Where a record comes from."""

    sae_steer: str
    commit: NotRequired[str | None]
    settings: dict[str, Any]
    inputs: dict[str, Any]


def conform(value: Any, kind: Any, where: str) -> None:
    """Raise `InputError` unless the value, read from JSON, is of the type; `where` names it."""
    origin = get_origin(kind)
    if kind is Any:
        return
    if origin in (NotRequired, Required):
        conform(value, get_args(kind)[0], where)
    elif origin is Annotated:
        base, *rules = get_args(kind)
        conform(value, base, where)
        for rule in rules:
            if not rule(value):
                raise _is_no(value, rule.called, where)
    elif _is_typed(kind):
        _object(value, kind, where)
    elif is_dataclass(kind):
        _settings(value, kind, where)
    elif origin is list:
        _is_a(value, list, "a list", where)
        for number, part in enumerate(value):
            conform(part, get_args(kind)[0], f"{where}[{number}]")
    elif origin is dict:
        _is_a(value, dict, "an object", where)
        keys, parts = get_args(kind)
        for key, part in value.items():
            conform(key, keys, f"a key of {where}")
            conform(part, parts, f"{where}.{key}")
    elif origin in (Union, UnionType):
        if not any(_conforms(value, part, where) for part in get_args(kind)):
            raise _is_no(value, " or ".join(_called(part) for part in get_args(kind)), where)
    elif not _is_plain(value, kind):
        raise _is_no(value, _called(kind), where)


def _object(value: Any, kind: Any, where: str) -> None:
    _is_a(value, dict, "an object", where)
    for key, part in get_type_hints(kind, include_extras=True).items():
        if key in value:
            conform(value[key], part, f"{where}.{key}")
        elif key in kind.__required_keys__:
            raise InputError(f"{where} lacks {key!r}")


def _settings(value: Any, kind: Any, where: str) -> None:
    """The fields of a dataclass, those without a default all there, and nothing else: it is called with them."""
    _is_a(value, dict, "an object", where)
    for part in fields(kind):
        if part.name not in value and part.default is MISSING and part.default_factory is MISSING:
            raise InputError(f"{where} lacks {part.name!r}")
    parts = get_type_hints(kind)
    for key, part in value.items():
        if key not in parts:
            raise InputError(f"{where} has {key!r}, which is none of {', '.join(parts)}")
        conform(part, parts[key], f"{where}.{key}")


def _is_plain(value: Any, kind: Any) -> bool:
    """A string, number, yes or no, or one of some values; True is no number here."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (NoneType if kind is None else kind) or (kind is dict and isinstance(value, dict))


def _conforms(value: Any, kind: Any, where: str) -> bool:
    try:
        conform(value, kind, where)
    except InputError:
        return False
    return True


def _is_a(value: Any, kind: type, called: str, where: str) -> None:
    if not isinstance(value, kind):
        raise _is_no(value, called, where)


def _is_no(value: Any, called: str, where: str) -> InputError:
    shown = repr(value)
    return InputError(f"{where} is {shown if len(shown) <= 40 else shown[:36] + '...'}, not {called}")


def _called(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        return get_args(kind)[1].called
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    names = {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false", NoneType: "null"}
    return names.get(kind, "an object" if _is_typed(kind) or origin is dict else "a list")
