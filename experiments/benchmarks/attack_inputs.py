"""Wrong inputs of every kind: none may end in a traceback, a hang, or a success that changes a number unsaid.

values    every option of every command with values that are no such thing
files     every file that a command reads: empty, cut, noise, a folder, nested without end, half a character, ...
records   every record with keys taken out and values of another type, its seal taken out as well
texts     text files and pair files that are wrong in one place
library   public functions called with what they do not take

Told: exit 1 or 2 with one line. Equal: exit 0 and the bytes of a right input. Anything else counts as bad, but for
values that mean something (`MEANT`).

    python experiments/benchmarks/attack_inputs.py            # attack_inputs.json
"""

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attack
import click
import numpy as np
import torch
from attack import COMMANDS, DICTIONARY, Outcome, Record, contents, forked, inside, run

import sae_steer as ss
from sae_steer.cli import main as group
from sae_steer.errors import SteerError

SAE = f"runs/toy/saes/{DICTIONARY}"
MEANT = {
    (flag, "18446744073709551616")
    for flag in (
        "--seed",
        "--top",
        "--rows-per-shard",
        "--prompts",
        "--width",
        "--max-tokens",
    )
}
"""Values that may be taken as they stand."""
WHOLE = ("-1", "1.5", "x", "", "nan", "18446744073709551616", "1e3", "0x1g")
REAL = ("nan", "inf", "-inf", "-1", "x", "", "1e400", "1,5")
WORDS = ("", " ", "nonsense", "..", "/etc/passwd", "\x1b[31mred", "a" * 3_000, "../../x", "none\nsuch", "é\u202e")
PLACES = ("nowhere", "", "notes.txt", "/dev/null", "seeds", "trained", "/proc/self", "loop", "\x1b[2J")
SMALL = {"train-pair": ("--preset", "tiny", "--tokens", "12000")}


@dataclass(frozen=True)
class Case:
    """One wrong input."""

    kind: str
    name: str
    act: Callable[[], Outcome]
    spoils: Callable[[], None] | None = None
    """Changes the workplace first."""
    touched: tuple[str, ...] = ()
    """Top folders that are put back afterwards."""
    right: str | None = None
    """The command whose right output is allowed as well."""


READERS: dict[str, tuple[tuple[str, ...], str]] = {
    "scan": ((*COMMANDS["scan"], "--out", "made"), "made"),
    "intervene": ((*COMMANDS["intervene"], "--out", "made"), "made"),
    "layers": ((*COMMANDS["layers"], "--out", "made"), "made"),
    "train-sae": ((*COMMANDS["train-sae"], "--out", "made"), "made"),
    "cache": ((*COMMANDS["cache"], "--out", "made"), "made"),
    "report": (COMMANDS["report"], "runs/toy"),
    "info": (("info", SAE), "none"),
    "trained": (("info", "trained"), "none"),
    "stability": (("scan", "--pair", "toy", "--sae", f"seeds/{DICTIONARY}", "--out", "made"), "made"),
}
"""{reader: command, and what it makes}"""
FILES = {
    "activations/toy/manifest.json": "scan",
    "activations/toy/shard-00000.h5": "train-sae",
    f"{SAE}/cfg.json": "scan",
    f"{SAE}/sae_weights.safetensors": "scan",
    f"{SAE}/training.json": "report",
    f"seeds/{DICTIONARY}/seed_stability.json": "stability",
    f"seeds/{DICTIONARY}/seed_stability.parquet": "stability",
    "runs/toy/scan/feature_diff.json": "intervene",
    "runs/toy/scan/features.parquet": "report",
    "runs/toy/scan/by_task.parquet": "intervene",
    "runs/toy/layers/layers.json": "report",
    "runs/toy/intervene/STUDY/results.json": "report",
    "runs/toy/intervene/STUDY/plan.toml": "report",
    "toy/pair.toml": "scan",
    "toy/tokenizer.json": "scan",
    "toy/adhd/config.json": "scan",
    "toy/adhd/model.safetensors": "scan",
    "trained/training.json": "trained",
    "trained/pair.toml": "trained",
}
"""What is read, and by which command."""


def values() -> Iterator[Case]:
    """Every option of every command."""
    for name, command in group.commands.items():
        if name not in {**COMMANDS, "selftest": 0, "features": 0, "steer": 0, "run": 0}:
            continue
        usual = list(COMMANDS.get(name, (name, "--pair", "toy")))
        if name == "steer":
            usual = ["steer", "take a break", "--pair", "toy", "--feature", "1", "--sae", SAE]
        if name == "features":
            usual = ["features", "1", "--pair", "toy", "--sae", SAE]
        for option in command.params:
            if not isinstance(option, click.Option) or option.is_flag or option.name == "out":
                continue
            flag = max(option.opts, key=len)
            if (name, flag) == ("run", "--cache"):  # where the cache is written, if it is not there: minutes of work
                continue
            for value in _wrong(option):
                arguments = [*usual, flag, value]
                yield Case("values", f"{name} {flag} {value[:40]!r}", lambda a=tuple(arguments): run(*a, *_out(a)))


def _out(arguments: tuple[str, ...]) -> tuple[str, ...]:
    return () if arguments[0] in ("report", "steer", "features", "info") else ("--out", "made")


def _wrong(option: click.Option) -> tuple[str, ...]:
    if isinstance(option.type, click.Path):
        return PLACES
    if isinstance(option.type, click.Choice):
        return ("", "nonsense", "1", "\x1b[31m")
    if isinstance(option.type, click.types.IntParamType):
        return WHOLE
    return REAL if isinstance(option.type, click.types.FloatParamType) else WORDS


def spoilt_files() -> Iterator[Case]:
    """Every file, as it may be left by a disk, an editor or an enemy."""
    noise = random.Random(0).randbytes(5_000)
    wounds: dict[str, Callable[[Path], None]] = {
        "empty": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "noise": lambda path: path.write_bytes(noise),
        "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "nested": lambda path: path.write_text("[" * 100_000),
        "nested objects": lambda path: path.write_text('{"a":' * 100_000),
        "a list": lambda path: path.write_text("[]"),
        "a number": lambda path: path.write_text("3"),
        "an object": lambda path: path.write_text("{}"),
        "null": lambda path: path.write_text("null"),
        "half a character": lambda path: path.write_text('{"provenance": "\\ud800", "name": "\\udc00"}'),
        "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
        "not a number": lambda path: path.write_text('{"a": NaN, "b": 1e999}'),
        "a long number": lambda path: path.write_text('{"a": ' + "9" * 6_000 + "}"),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        "gone": lambda path: path.unlink(),
        "a loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
        "a device": lambda path: (path.unlink(), path.symlink_to("/dev/null")),
        "twice": lambda path: path.write_bytes(path.read_bytes() * 2),
    }
    for file, reader in FILES.items():
        for name, wound in wounds.items():
            yield Case(
                "files", f"{file}: {name}", lambda reader=reader: run(*READERS[reader][0]),
                lambda file=file, wound=wound: wound(_placed(file)) and None, (file.split("/")[0],), reader,
            )  # fmt: skip


def _placed(file: str) -> Path:
    if "STUDY" in file:
        return next(Path.cwd().glob(file.replace("STUDY", "feature-*")))
    return Path(file)


def spoilt_records() -> Iterator[Case]:
    """Every record with keys taken out, and with values of another type; the seal is taken out, for it would tell."""
    for file, reader in FILES.items():
        if not file.endswith(".json") or file in ("toy/tokenizer.json",):
            continue
        for number in range(22):
            yield Case(
                "records", f"{file}: {number}", lambda reader=reader: run(*READERS[reader][0]),
                lambda file=file, number=number: _mutate(_placed(file), number), (file.split("/")[0],), reader,
            )  # fmt: skip


def _mutate(path: Path, number: int) -> None:
    draw, record = random.Random(f"{path.name} {number}"), json.loads(path.read_text())
    record.pop("seal", None)
    (record.get("metadata") or {}).get("sae_steer", {}).pop("seal", None)
    places = list(_places(record))
    top = [place for place in places if len(place) == 1]
    place = draw.choice(top if number % 2 else places)
    parent = record
    for key in place[:-1]:
        parent = parent[key]
    old = parent[place[-1]]
    if number % 3 == 0:
        del parent[place[-1]]
    else:
        others = ["text", [], {}, [1, "a", None], {"a": {"b": []}}, True, None, "\x1b[31m", "../../.."]
        parent[place[-1]] = draw.choice([other for other in others if type(other) is not type(old)])
    path.write_text(json.dumps(record))


def _places(value: Any, here: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, part in items:
        yield (*here, key)
        yield from _places(part, (*here, key))


def texts() -> Iterator[Case]:
    """Text files and pair files that are wrong in one place."""
    plan = "Plan a trip<|steps|>Pack a bag<|sep|>Sip water<|sep|><|end|>"
    line = {"text": plan, "task": "trip"}
    contents = {
        "t.txt": ["", "\n\n", "\ufeff", "no step here\n", "<|sep|>", "<|end|>" * 5, "\x00\x00", f"{plan}\n\n{plan}\n",
                  "a" * 2_000_000, plan * 400],
        "t.jsonl": ["{", "[]", "3", "null", '{"txt": "a"}', '{"text": 3}', '{"text": ["a"]}', '{"text": ""}',
                    json.dumps({**line, "task": 3}), json.dumps({**line, "rendering": "nobody"}),
                    json.dumps({**line, "extra": 1}), '{"text": "\\ud800"}', "[" * 100_000,
                    json.dumps(line) + "\nbroken", '{"text": "a", "text": "b"}', json.dumps({"text": None}),
                    json.dumps({**line, "variant": "x" * 10_000})],
        "t.csv": [plan], "t": [plan],
    }  # fmt: skip
    for name, parts in contents.items():
        for number, content in enumerate(parts):
            yield Case(
                "texts", f"{name}: {number}",
                lambda name=name: run("cache", "--pair", "toy", "--texts", name, "--out", "made"),
                lambda name=name, content=content: Path(name).write_text(content, errors="surrogatepass") and None,
            )  # fmt: skip
    changes = {
        "context": [-1, 0, 10**12, "512", True, 1.5, []], "tokenizer": [3, "nowhere.json", "", [], "../.."],
        "reference.name": ["adhd", "target", "..", ".", "a/b", "", 3, "a b", "\x1b[31m"],
        "target.model": ["nowhere", "", 3, "hub:", "tl:", "..", "hub:a/b/c"],
        "target.phrases": [[], "water", [3], [""], {}], "target.lenient": ["water", [3]],
        "onset.tokens": [[], ["<|nope|>"], "x", [3]], "onset.regex": ["(", "", 3, "(?<=a+)b"],
        "extra": [1], "target.phrase": [["a"]], "onset.token": [["<|sep|>"]],
    }  # fmt: skip
    for key, replacements in changes.items():
        for number, value in enumerate(replacements):
            yield Case(
                "texts", f"pair.toml {key}: {number}",
                lambda: run(*READERS["scan"][0]), lambda key=key, value=value: _retold(key, value), ("toy",), "scan",
            )  # fmt: skip


def _retold(key: str, value: Any) -> None:
    import tomllib

    import tomli_w

    facts = tomllib.loads(Path("toy/pair.toml").read_text())
    *above, last = key.split(".")
    place = facts
    for part in above:
        place = place[part]
    place[last] = value
    Path("toy/pair.toml").write_text(tomli_w.dumps(facts))


def library() -> Iterator[Case]:
    """Public functions called with what they do not take."""
    wrong: list[Any] = [None, 3, -1, 2.5, "nonsense", b"bytes", [], {}, (), float("nan"), object(), np.zeros(3),
                        torch.zeros(2, 2), Path("nowhere"), lambda: 0]  # fmt: skip
    calls: dict[str, Callable[[Any], Any]] = {
        "load_pair": lambda value: ss.load_pair(value),
        "load_dictionary": lambda value: ss.load_dictionary(value),
        "load_sae": lambda value: ss.load_sae(value),
        "write_report": lambda value: ss.write_report(value),
        "ActivationCache.open": lambda value: ss.ActivationCache.open(value),
        "TextFile.read": lambda value: ss.TextFile.read(value),
        "cache_activations layers": lambda value: ss.cache_activations(_pair(), layers=value, out="made"),
        "train_sae layer": lambda value: ss.train_sae(_cache(), model="adhd", layer=value, out="made"),
        "train_sae model": lambda value: ss.train_sae(_cache(), model=value, layer=2, out="made"),
        "train_sae settings": lambda value: ss.train_sae(
            _cache(), model="adhd", layer=2, settings=3 if value is None else value
        ),
        "SAESettings k": lambda value: ss.SAESettings(k=value),
        "ScanSettings min_rate": lambda value: ss.ScanSettings(min_rate=value),
        "scan_features": lambda value: ss.scan_features(_cache(), value),
    }
    for name, call in calls.items():
        for number, value in enumerate(wrong):
            yield Case("library", f"{name}: {number}", lambda call=call, value=value: _called(call, value))


def _some(value: Any) -> Any:
    return 3 if value is None else value  # None means the default


def _pair():
    return ss.load_pair("toy")


def _cache():
    return ss.ActivationCache.open("activations/toy")


def _called(call: Callable[[Any], Any], value: Any) -> Outcome:
    """A library call as an outcome: a `SteerError` of one line is told, anything else it raises a traceback."""
    import traceback

    try:
        call(copy.copy(value) if isinstance(value, list | dict) else value)
    except SteerError as error:
        return Outcome(1 if "\n" not in str(error) else "traceback", f"Error: {error}", 0.0)
    except BaseException:
        return Outcome("traceback", traceback.format_exc(), 0.0)
    return Outcome(0, "", 0.0)


FAMILIES = (values, spoilt_files, spoilt_records, texts, library)
TAKEN = ("library SAESettings k: 1", "library ScanSettings min_rate: 3")
"""Calls that are right after all."""


def main() -> None:
    """Try every wrong input that has not been tried."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--base", type=Path, default=Path(tempfile.gettempdir()) / "sae-steer-attack")
    parser.add_argument("--share", type=float, default=1.0, help="Of the cases; less for a first look.")
    parser.add_argument("--only", nargs="*", help="Families by name.  [default: all]")
    asked = parser.parse_args()
    record = Record.open(asked.out)
    attack.PATIENCE = 240.0
    with attack.tiny_training(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(attack.workplace(asked.base), Path(scratch) / "place"))
        backup = Path(shutil.copytree(folder, Path(scratch) / "backup"))
        with inside(folder):
            Path("notes.txt").write_text("nothing of yours\n")
            Path("loop").symlink_to("loop")
            right = {name: outcome_of(name, folder, backup) for name in READERS}
            for family in [one for one in FAMILIES if not asked.only or one.__name__ in asked.only]:
                cases = list(family())
                cases = [cases[int(number / asked.share)] for number in range(int(len(cases) * asked.share))]
                for case in cases[record.done(family.__name__) :]:
                    attempt(case, family.__name__, folder, backup, right, record)
    print(asked.out)
    if record.bad:
        sys.exit(f"{len(record.bad)} wrong inputs were neither refused in a line nor harmless")


def outcome_of(reader: str, folder: Path, backup: Path) -> dict[str, bytes]:
    """What a reader makes of right input."""
    outcome = forked(lambda: run(*READERS[reader][0]))
    assert outcome.code == 0, outcome
    made = contents(Path(READERS[reader][1])) if Path(READERS[reader][1]).is_dir() else {}
    put_back(folder, backup, ("runs",))
    return made


def attempt(case: Case, family: str, folder: Path, backup: Path, right: dict, record: Record) -> None:
    """One wrong input."""
    if case.spoils:
        case.spoils()
    outcome = forked(case.act)
    name = f"{case.kind} {case.name}"
    if outcome.is_told or (case.right in ("info", "trained") and outcome.code == 1):  # info says what is not whole
        ended = "told"
    elif case.right in ("report", "stability") and outcome.code == 0 and case.name.endswith((": gone", ": a device")):
        ended = "told"  # the page names what is missing; the stability of seeds is one column more, where it is known
    elif outcome.code == 0 and _is_equal(case, right):
        ended = "equal"
    elif outcome.code == 0 and case.kind == "records" and _is_equal(case, right, ".parquet"):
        ended = "shown as it stands"  # a record changed by hand and its seal taken out: what it says, no measurement
    elif outcome.code == 0:
        ended = "accepted"
    else:
        ended = str(outcome.code) if isinstance(outcome.code, str) else f"exit {outcome.code}, not one line"
    fine = (
        ended in ("told", "equal", "shown as it stands")
        or name in TAKEN
        or any(f"{flag} {value!r}" in name for flag, value in MEANT)
    )
    record.add(family, ended, bad=None if fine else {"input": name, "said": outcome.said[-900:]})
    if not fine:
        print(name, ended, outcome.said[-200:], file=sys.stderr, flush=True)
    put_back(folder, backup, case.touched)


def _is_equal(case: Case, right: dict, ending: str = "") -> bool:
    """Whether the files of this ending say what they say after right input; the spoilt one is no result."""
    if case.right is None:
        return False
    made = Path(READERS[case.right][1])
    found = {name: _figures(name, content) for name, content in contents(made).items()} if made.is_dir() else {}
    whole = {name: _figures(name, content) for name, content in right[case.right].items()}
    other = {name for name in {**found, **whole} if name.endswith(ending) and found.get(name) != whole.get(name)}
    return all(name.endswith(Path(case.name.split(":")[0]).name) for name in other)


def _figures(name: str, content: bytes) -> Any:
    """What a file says, but for what it was made from."""
    if not name.endswith(".json"):
        return content
    try:
        record = json.loads(content)
    except ValueError:
        return content
    made_from = ("provenance", "seal", "files", "plan")
    return {key: value for key, value in record.items() if key not in made_from} if isinstance(record, dict) else record


def put_back(folder: Path, backup: Path, touched: tuple[str, ...]) -> None:
    """The workplace as it was."""
    shutil.rmtree(folder / "made", ignore_errors=True)
    for name in {*touched, "runs"} if touched else ():
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(backup / name, folder / name)


if __name__ == "__main__":
    main()
