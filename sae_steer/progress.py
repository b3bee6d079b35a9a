"""What long work tells its caller."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """What long work tells its caller: the command line draws it, tests collect it."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are finished; `note` is a short status for people."""


def silent(done: int, total: int, note: str = "") -> None:
    """The `Progress` that says nothing."""
