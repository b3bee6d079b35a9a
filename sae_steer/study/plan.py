"""What will be tested and how, written down before the confirm texts are read.

`plan.toml` holds the source of the direction, the measured tokens, every setting (positions, doses, bound, controls,
seeds) and the content of each split, under a hash. A plan edited after its hash is refused; one replaced by
`--force` lists what changed, and the report repeats the list.
"""

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import tomli_w

from sae_steer.errors import InputError, StaleError
from sae_steer.files import sha256, write_text
from sae_steer.shapes import conform

PLAN_FILE = "plan.toml"


class PlanContent(TypedDict):
    """`plan.toml`."""

    hash: str
    plan: dict
    changes: NotRequired[list[dict]]


@dataclass(frozen=True)
class Plan:
    """A study's fixed part."""

    content: dict
    """What the hash is of: plain tables, strings and numbers."""
    changes: tuple[dict, ...] = field(default=())
    """What replaced plans said: {key, was, now}, the oldest first."""

    @property
    def hash(self) -> str:
        """Of the content, however the file is laid out."""
        return sha256(json.dumps(self.content, sort_keys=True).encode())

    def record(self) -> dict:
        """For a study's record."""
        return {"file": PLAN_FILE, "hash": self.hash, "changes": list(self.changes)}

    def write(self, folder: Path) -> Path:
        """`plan.toml` in `folder`."""
        body = tomli_w.dumps({"hash": self.hash, "plan": self.content, "changes": list(self.changes)})
        note = (
            "# Written before the confirm texts were read. Edited by hand, it no longer fits its hash and is refused.\n"
        )
        return write_text(Path(folder) / PLAN_FILE, note + body)


def fix_plan(folder: Path, wanted: dict, *, force: bool = False) -> Plan:
    """The plan in `folder`, written now unless the same one is there.

    One that was edited after its hash is an `InputError`, another one a `StaleError`; `force` replaces either and
    keeps the list of changes.
    """
    path, content = Path(folder) / PLAN_FILE, _plain(wanted)
    if not path.is_file():
        plan = Plan(content)
        plan.write(folder)
        return plan
    try:
        there, known_hash = read_plan(path)
    except InputError:
        if not force:
            raise
        plan = Plan(content, ({"key": PLAN_FILE, "was": "cut or damaged", "now": "written anew"},))
        plan.write(folder)
        return plan
    edited = there.hash != known_hash
    if edited and not force:
        raise InputError(
            f"{path} was edited after its hash; put back what was changed, or start a new plan with --force, which "
            "lists the change in the report"
        )
    changes = _changes(there.content, content)
    if not changes and not edited:
        return there
    if not force:
        first = changes[0]
        raise StaleError(
            f"{path} plans another study ({first['key']}: {first['was']}, now {first['now']}); choose another --out, "
            "or --force to replace it, which lists the change in the report"
        )
    by_hand = [{"key": "plan.toml", "was": known_hash, "now": "edited by hand"}] if edited else []
    plan = Plan(content, (*there.changes, *by_hand, *changes))
    plan.write(folder)
    return plan


def read_plan(path: Path) -> tuple[Plan, str]:
    """A plan file's content, and the hash written in it."""
    try:
        facts = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        conform(facts, PlanContent, "it")
    except (OSError, ValueError, RecursionError, InputError) as error:
        raise InputError(f"{path} is no plan ({error}); start a new one with --force") from error
    return Plan(facts["plan"], tuple(facts.get("changes", ()))), facts["hash"]


def check_unedited(folder: Path, planned: str | None) -> None:
    """Raise `InputError` if the plan in a finished study's folder has another hash than the one it was made under."""
    path = Path(folder) / PLAN_FILE
    if planned and path.is_file() and read_plan(path)[0].hash != planned:
        raise InputError(
            f"{path} was edited after the study ended; put back what was changed, or make the study anew with --force"
        )


def _changes(was: dict, now: dict, path: str = "") -> list[dict]:
    """Leaves that differ, as texts."""
    changes = []
    for key in sorted({*was, *now}):
        old, new, name = was.get(key), now.get(key), f"{path}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new, f"{name}.")
        elif old != new:
            changes.append({"key": name, "was": json.dumps(old), "now": json.dumps(new)})
    return changes


def _plain(value: Any) -> Any:
    """As TOML reads it back: no None, tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
