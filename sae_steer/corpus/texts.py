"""Texts a user brings (`--texts FILE`): one a line in `.txt`, or JSON objects a line in `.jsonl`.

A JSON object has "text" and may have "task", the cluster its statistics belong to, and "rendering", the name of the
model whose kind of text it is ("variant" in older files). Without a task, texts of one title belong together, and a
text that is no plan stands alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from sae_steer.arguments import nearest
from sae_steer.corpus.plans import SPECIAL_PATTERN, parse_plan
from sae_steer.errors import InputError

RENDERING, FORMERLY = "rendering", "variant"
KEYS = ("text", "task", RENDERING, FORMERLY)


@dataclass(frozen=True)
class UserText:
    """One text of a user's file, and where it stood."""

    text: str
    task: str
    rendering: str | None
    line: int


def read_texts(path: Path | str) -> list[UserText]:
    """The texts of a `.txt` or `.jsonl` file; the first fault is an error that names its line."""
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}; give a .txt or .jsonl file")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the name given to --texts") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    if not content.strip():
        raise InputError(f"{path} is empty; put one text on each line")
    lines = content.rstrip().split("\n")
    read = _from_json if path.suffix == ".jsonl" else _from_line
    return [read(line.removesuffix("\r"), number, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _from_line(line: str, number: int, where: str) -> UserText:
    return _user_text(line, None, None, number, where)


def _from_json(line: str, number: int, where: str) -> UserText:
    try:
        row = json.loads(line, object_pairs_hook=lambda pairs: _without_repeats(pairs, where))
    except json.JSONDecodeError as error:
        raise InputError(f'{where}: not JSON ({error.msg}); write {{"text": "..."}}') from error
    except RecursionError as error:
        raise InputError(f'{where}: nested too deep; write {{"text": "..."}}') from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{where}: no "text" string; write {{"text": "..."}}')
    for key in row:
        if key not in KEYS:
            raise InputError(f"{where}: {key!r} is no key of a text{nearest(key, KEYS)}")
        if not isinstance(row[key], str | None):
            raise InputError(f'{where}: "{key}" is no string; write it in quotes or leave it out')
    if {RENDERING, FORMERLY} <= row.keys():
        raise InputError(f'{where}: "{FORMERLY}" is the older name of "{RENDERING}"; leave it out')
    return _user_text(row["text"], row.get("task"), row.get(RENDERING, row.get(FORMERLY)), number, where)


def _without_repeats(pairs: list[tuple[str, object]], where: str) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise InputError(f'{where}: "{repeated}" stands twice; write it once')
    return row


def _user_text(text: str, task: str | None, rendering: str | None, number: int, where: str) -> UserText:
    if any("\ud800" <= char <= "\udfff" for char in text + (task or "") + (rendering or "")):
        raise InputError(f"{where}: half of a surrogate pair, which is no character; take it out")
    if not SPECIAL_PATTERN.sub("", text).strip():
        raise InputError(f"{where}: the text is empty or only special tokens; remove the line")
    plan = parse_plan(text)
    own = plan.title if plan.steps and plan.title else text
    return UserText(text, task or own, rendering, number)
