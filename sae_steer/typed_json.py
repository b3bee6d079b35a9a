"""Frozen dataclasses to JSON and back: the one place where a result becomes a record, and the one that reads it again.

A field's key is its name, or what `field(metadata=key("..."))` says. The fields of a `FLAT` one stand among its
owner's own; an `ASIDE` one is no part of the record.
"""

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
FLAT, ASIDE = {"flat": True}, {"aside": True}


class NotSuchRecordError(ValueError):
    """A record's content is not of the type asked for; says where, and what is there."""


def key(name: str) -> dict[str, str]:
    """The metadata of a field whose key is not its name."""
    return {"key": name}


def as_json(value: Any) -> Any:
    """Dataclasses as mappings, tuples as lists, numpy's numbers as numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if "flat" in field.metadata:
                found |= as_json(part) if part is not None else {}
            elif "aside" not in field.metadata:
                found[field.metadata.get("key", field.name)] = as_json(part)
        return found
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


def of_json(kind: type[T], value: Any, where: str = "") -> T:
    """A dataclass from what `as_json` made of it; keys it does not know are left out.

    Raises:
        NotSuchRecordError: a key is not there, or holds something of another type.
    """
    return _read(kind, value, where or "the record")


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = next(part for part in parts if part is not types.NoneType)
        return None if value is None else _read(inner, value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, _checked(dict, value, where), where)
    if origin is tuple:
        return tuple(_read(parts[0], part, f"{where}[{i}]") for i, part in enumerate(_checked(list, value, where)))
    if origin in (dict, Mapping):
        return {name: _read(parts[1], part, f"{where}.{name}") for name, part in _checked(dict, value, where).items()}
    if origin is Literal:
        if value not in parts:
            raise NotSuchRecordError(f"{where} is {str(value)[:40]!r}, which is none of {', '.join(map(str, parts))}")
        return value
    return value if kind is Any else _checked(kind, value, where)


def _dataclass(kind: type[T], record: dict, where: str) -> T:
    hints, found = _hints(kind), {}
    for field in dataclasses.fields(kind):
        if "aside" in field.metadata:
            continue
        if "flat" in field.metadata:
            found[field.name] = _flat(hints[field.name], record, where)
            continue
        name = field.metadata.get("key", field.name)
        if name in record:
            found[field.name] = _read(hints[field.name], record[name], f"{where}.{name}")
        elif _is_required(field):
            raise NotSuchRecordError(f"{where} lacks {name!r}")
    return kind(**found)


def _flat(kind: Any, record: dict, where: str) -> Any:
    """A part whose keys stand among its owner's; None if it may be and none of its own is there."""
    inner = next(part for part in (*get_args(kind), kind) if dataclasses.is_dataclass(part))
    own = {field.metadata.get("key", field.name) for field in dataclasses.fields(inner) if _is_required(field)}
    return None if inner is not kind and not own & record.keys() else _dataclass(inner, record, where)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _checked(kind: type, value: Any, where: str) -> Any:
    """The value, if it is of the kind; a whole number is a number too, and a truth value is neither."""
    wanted = (int, float) if kind is float else kind
    if isinstance(value, wanted) and not (isinstance(value, bool) and kind is not bool):
        return value
    raise NotSuchRecordError(f"{where} holds a {type(value).__name__} and should hold a {kind.__name__}")
