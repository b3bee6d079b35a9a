"""What the attacks share: a workplace where every command has run on a toy pair, and ways to run and compare.

The toy pair and the settings are those of the tests: a whole study in seconds. A command runs in this process, as
click runs it, or in a fork of it, which costs no imports and can be killed.
"""

# ruff: noqa: E402  (the tests' toy pair is found once their folder is on the path)
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch
from isa import machine
from toy import write_toy_pair

from sae_steer.cli import main
from sae_steer.files import write_text
from sae_steer.model.decoder import DecoderSettings
from sae_steer.outputs import LEDGER
from sae_steer.pair import training
from sae_steer.records import commit
from sae_steer.settings import PRESETS, PairTrainingSettings, SAESettings

PATIENCE = 1_200.0
"""Seconds after which a command counts as hanging."""
UNEQUAL = (LEDGER, "timing.json", "log.jsonl")
"""Files that two equal runs need not share: when they ran, and in how many goes."""
FORK = multiprocessing.get_context("fork")
DICTIONARY = "adhd_L2_hook_resid_post_k6_d48"
COMMANDS: dict[str, tuple[str, ...]] = {
    "train-pair": ("train-pair", "--preset", "tiny", "--tokens", "12000", "--out", "trained"),
    "cache": (
        "cache", "--pair", "toy", "--train-plans", "60", "--scan-plans", "40", "--tune-plans", "30",
        "--confirm-plans", "40",
    ),
    "train-sae": (
        "train-sae", "--pair", "toy", "--k", "6", "--d-sae", "48", "--rows", "6400", "--batch-size", "256",
    ),
    "scan": ("scan", "--pair", "toy", "--sae", f"runs/toy/saes/{DICTIONARY}"),
    "intervene": (
        "intervene", "--pair", "toy", "--sae", f"runs/toy/saes/{DICTIONARY}", "--quick", "--generations", "0",
        "--prompts", "30",
    ),
    "layers": ("layers", "--pair", "toy", "--prompts", "10"),
    "report": ("report", "--pair", "toy"),
}  # fmt: skip
"""The study in order; `train-pair` stands apart."""
SEEDS = (*COMMANDS["train-sae"], "--seed", "0", "--seed", "1", "--out", "seeds")
"""Several dictionaries over one reading."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | str
    """The exit code, or `hang`, `traceback`, `killed`."""
    said: str
    seconds: float

    @property
    def is_told(self) -> bool:
        """Refused in one line."""
        lines = [line for line in self.said.strip().splitlines() if line.startswith("Error:")]
        return self.code in (1, 2) and len(lines) == 1


@contextmanager
def tiny_training() -> Iterator[None]:
    """`train-pair --preset tiny` takes a second, and both trainings leave checkpoints on the way."""
    SAESettings.__init__.__kwdefaults__["checkpoint_every"] = 4
    PairTrainingSettings.__init__.__kwdefaults__["checkpoint_every"] = 4
    PRESETS["tiny"] = DecoderSettings(
        n_layers=2, n_heads=2, n_kv_heads=2, d_model=16, d_head=8, d_mlp=24, d_vocab=400 + 5
    )
    training.TOKENIZER_PLANS, training.HELD_OUT_PLANS = 40, 4
    training.measure_pair = lambda pair, *, seed, on_step: {"left out": True}
    choices = main.commands["train-pair"].params[0].type
    choices.choices = [*choices.choices, "tiny"]
    yield


def run(*arguments: str) -> Outcome:
    """A command in this process; what it raises beyond click's own is a traceback."""
    out, start = io.StringIO(), time.monotonic()
    code: int | str = 0
    with redirect_stdout(out), redirect_stderr(out):
        try:
            main.main(args=[str(argument) for argument in arguments], prog_name="sae-steer", standalone_mode=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            code = "traceback"
            out.write(traceback.format_exc())
    return Outcome(code, out.getvalue(), time.monotonic() - start)


def forked(act: Callable[[], Outcome], *, kill_after: float | None = None) -> Outcome:
    """`act` in a fork of this process, killed after some seconds if it still runs, and as hanging after `PATIENCE`."""
    process, ours = start(act)
    return finish(process, ours, kill_after=kill_after)


def start(act: Callable[[], Outcome]):
    """The running fork, and where its outcome will come from."""
    ours, theirs = FORK.Pipe(duplex=False)

    def work() -> None:
        os.setpgid(0, 0)
        torch.set_num_threads(1)
        theirs.send(act())
        theirs.close()
        os._exit(0)

    process = FORK.Process(target=work)
    process.start()
    theirs.close()
    return process, ours


def finish(process, ours, *, kill_after: float | None = None) -> Outcome:
    """The outcome of a fork."""
    began = time.monotonic()
    ended = ours.poll(PATIENCE if kill_after is None else kill_after)
    try:
        outcome = ours.recv() if ended else Outcome("killed" if kill_after is not None else "hang", "", 0.0)
    except EOFError:
        outcome = Outcome("traceback", "the process ended without a word", 0.0)
    if process.is_alive() and not ended:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    ours.close()
    return Outcome(outcome.code, outcome.said, time.monotonic() - began)


def workplace(folder: Path) -> Path:
    """A folder where every command has run; made once, used again if it is whole and of this code."""
    mark = folder / "whole"
    if not mark.is_file() or mark.read_text() != commit():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_toy_pair(folder / "toy")
        with inside(folder):
            for arguments in (*COMMANDS.values(), SEEDS):
                outcome = forked(lambda arguments=arguments: run(*arguments))
                assert outcome.code == 0, (arguments, outcome)
        mark.write_text(str(commit()))
    return folder


@contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """The current folder, for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def contents(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of everything but what two equal runs need not share."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in UNEQUAL)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass
class Record:
    """What an attack has found so far, written after every try, and gone on with."""

    path: Path
    tries: dict[str, dict[str, int]] = field(default_factory=dict)
    """{kind: {how it ended: tries}}"""
    bad: list[dict] = field(default_factory=list)
    """What ended as it should not."""

    @classmethod
    def open(cls, path: Path) -> "Record":
        """The record at `path`, or a new one; one of other code is begun anew."""
        if path.is_file() and (found := json.loads(path.read_text()))["commit"] == commit():
            return cls(path, found["tries"], found["bad"])
        return cls(path)

    @property
    def total(self) -> int:
        """Tries in all."""
        return sum(sum(kinds.values()) for kinds in self.tries.values())

    def done(self, kind: str) -> int:
        """Tries of a kind."""
        return sum(self.tries.get(kind, {}).values())

    def add(self, kind: str, ended: str, *, bad: dict | None = None) -> None:
        """One more try."""
        here = self.tries.setdefault(kind, {})
        here[ended] = here.get(ended, 0) + 1
        if bad is not None:
            self.bad.append({"kind": kind, "ended": ended, **bad})
        content = {"commit": commit(), "machine": machine(), "total": self.total, "tries": self.tries, "bad": self.bad}
        write_text(self.path, json.dumps(content, indent=1) + "\n")
