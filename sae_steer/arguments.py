"""What a setting or an argument may be: its annotation says so, and one function holds the value against it.

    lr: Annotated[float, Range(0, above=True)]        "lr is nan, and takes a number above 0"

1. `Checked` does it for the fields of a dataclass, before one is made.
2. `checked` does it for the arguments of a function, before anything of it runs; the package's door puts it around
   every public function, so none checks types and ranges by itself.
3. What is meant is taken: a numpy integer for an `int`, a whole number for a `float`, a list for a tuple.
   What fits nothing is an `InputError` that says what was given and what is taken, the nearest name where it is one.
"""

import inspect
import math
import numbers
import operator
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, wraps
from os import PathLike
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from sae_steer.errors import InputError

LONGEST = 60
"""Characters of a value that an error shows."""


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`."""

    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False
    """Whether `low` itself is left out."""

    def __contains__(self, value: int | float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        lower = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        if math.isinf(self.high):
            return lower
        if math.isinf(self.low):
            return f"of at most {self.high:,g}"
        return f"{lower} and at most {self.high:,g}" if self.above else f"from {self.low:g} to {self.high:,g}"


Count = Annotated[int, Range(1)]
Some = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Positive = Annotated[float, Range(0, above=True)]
AtLeastZero = Annotated[float, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]


class Misfit(Exception):
    """A value that is not what the annotation says."""


class _CheckedWhenMade(type):
    """Makes a dataclass's instances by way of `check`: before its `__init__`, as a function's arguments are."""

    if not TYPE_CHECKING:  # to a type checker the class is called as it stands

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            signature, hints = _fields_of(cls)
            values = _bound(cls.__name__, signature, args, kwargs).arguments
            return super().__call__(
                **{name: check(f"{cls.__name__}.{name}", value, hints[name]) for name, value in values.items()}
            )


class Checked(metaclass=_CheckedWhenMade):
    """Settings whose fields are held against their annotations when they are made."""


@cache
def _fields_of(kind: type) -> tuple[inspect.Signature, dict[str, Any]]:
    _, *parameters = inspect.signature(kind.__init__).parameters.values()
    return inspect.Signature(parameters), get_type_hints(kind, include_extras=True)


P, R = ParamSpec("P"), TypeVar("R")


@cache
def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, its arguments held against their annotations before it runs."""
    signature = inspect.signature(function)
    hints = inspect.unwrap(function).__annotations__

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = _bound(function.__name__, signature, args, kwargs)
        for name, value in bound.arguments.items():
            plain = signature.parameters[name].kind not in (
                inspect.Parameter.VAR_KEYWORD,
                inspect.Parameter.VAR_POSITIONAL,
            )
            if plain and name in hints and value is not signature.parameters[name].default:
                bound.arguments[name] = check(f"{name} of {function.__name__}", value, hints[name])
        return function(*bound.args, **bound.kwargs)

    return run


def check(name: str, value: Any, hint: Any) -> Any:
    """The value as the annotation means it, or an `InputError` that says what `name` takes."""
    try:
        return _taken(value, hint)
    except Misfit as misfit:
        raise InputError(f"{name} is {shown(value)}, and takes {str(misfit) or described(hint)}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """How an error goes on after a name that nothing has: the nearest that there is, or all of them."""
    names = sorted(known)
    for cutoff in (0.6, 0.45):
        if close := get_close_matches(name, names, 1, cutoff):
            return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(map(repr, names))}" if names else "; there is none"


def shown(value: Any) -> str:
    """A value as an error shows it: in one line, and a tensor or array by its type and shape."""
    if hasattr(value, "dtype") and hasattr(value, "shape") and getattr(value, "ndim", 0):
        return f"a {type(value).__name__} of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def described(hint: Any) -> str:
    """What an annotation takes, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{described(args[0])} {' '.join(map(str, args[1:]))}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(arg) for arg in args))
    if origin is tuple and args and args[-1] is not ...:
        return f"{len(args)} values: {', '.join(map(described, args))}"
    if _is_many(origin) and args:
        return f"a sequence, each {described(args[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "True or False", Path: "a path",
            type(None): "None"}.get(hint) or _named(hint)  # fmt: skip


def _named(hint: Any) -> str:
    if hasattr(hint, "dim_str"):  # a tensor with its shape, as jaxtyping writes it
        return f"a tensor {hint.__name__}"
    return f"a {getattr(hint, '__name__', str(hint))}"


def _taken(value: Any, hint: Any) -> Any:
    """The value converted to what `hint` says, or a `Misfit`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _ranged(_taken(value, args[0]), args[1:])
    if origin in (Union, types.UnionType):
        return _any_of(value, args)
    if origin is Literal:
        return _one_of(value, args)
    if _is_many(origin):
        return _each(value, origin, args)
    if hint in PLAIN:
        return PLAIN[hint](value)
    if hint is Any or isinstance(hint, TypeVar) or _is_instance(value, origin or hint):
        return value
    raise Misfit


def _ranged(value: Any, ranges: tuple) -> Any:
    if any(isinstance(one, Range) and value not in one for one in ranges):
        raise Misfit
    return value


def _any_of(value: Any, hints: tuple) -> Any:
    """Of several annotations the first that takes the value; where none does, what comes nearest speaks."""
    told = ""
    for hint in hints:
        try:
            return _taken(value, hint)
        except Misfit as misfit:
            told = told or str(misfit)
    raise Misfit(told)


def _one_of(value: Any, choices: tuple) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    words = [choice for choice in choices if isinstance(choice, str)]
    close = get_close_matches(value.casefold(), words, 1) if isinstance(value, str) else []
    raise Misfit(f"one of {', '.join(map(repr, choices))}" + (f"; did you mean {close[0]!r}?" if close else ""))


def _each(value: Any, origin: Any, args: tuple) -> Any:
    """A sequence or set whose every item fits; text is none of them."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise Misfit
    if not isinstance(value, Collection):
        return value  # an iterator can be read but once
    if origin is not tuple:
        _ = [_taken(item, args[0]) for item in value] if args else None
        return value
    if args and args[-1] is not ... and len(value) != len(args):
        raise Misfit
    return tuple(_taken(item, args[0] if args[-1] is ... else args[at]) for at, item in enumerate(value))


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise Misfit
    try:
        return operator.index(value)
    except TypeError:
        raise Misfit from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise Misfit
    return float(value)


def _path(value: Any) -> Path:
    if not isinstance(value, str | PathLike) or "\0" in str(value) or not str(value):
        raise Misfit("a path")
    return Path(value)


def _nothing(value: Any) -> None:
    if value is not None:
        raise Misfit


PLAIN: dict[Any, Callable[[Any], Any]] = {int: _whole, float: _number, Path: _path, type(None): _nothing}


def _is_many(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping)


def _is_instance(value: Any, kind: Any) -> bool:
    if kind is Callable:
        return callable(value)
    try:
        return isinstance(value, kind)
    except TypeError:  # an annotation that says nothing at run time
        return True


def _bound(name: str, signature: inspect.Signature, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    parameters = signature.parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        for given in kwargs:
            if given not in parameters:
                raise InputError(f"{name} has no argument {given!r}{nearest(given, parameters)}")
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{name}: {error}; call it as {name}({', '.join(parameters)})") from error
