"""Killed at any moment, shared by two processes of which one may die: the cache ends in the same bytes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_cache import FEW, SETTINGS, contents, refusal, write

from sae_steer.cache import writing
from sae_steer.errors import SteerError
from sae_steer.world import joined

WRITER = """
import os, sys, time
import torch
from sae_steer.cache import cache_activations, writing
from sae_steer.errors import SteerError
from sae_steer.pair.model_pair import load_pair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.world import joined
from sae_steer.settings import CacheSettings, CorpusSettings

def write(out, rank, size, port):
    os.environ |= {{"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank}}
    os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}}
    torch.set_num_threads({threads})
    streams = writing._streams
    writing._streams = lambda *arguments: (time.sleep(0.03), streams(*arguments))[1]
    try:
        with joined(device="cpu") as world:
            cache_activations(load_pair({pair!r}), out=out, layers=(0, 2), settings={settings!r},
                              source=GeneratedTexts({few!r}), world=world)
    except SteerError:
        os._exit(3)
    os._exit(0)

for line in sys.stdin:  # children for every folder named; nothing has run in torch yet, so a fork is safe
    out, size, port = line.split()
    children = []
    for rank in range(int(size)):
        children.append(os.fork())
        if not children[-1]:
            write(out, str(rank), size, port)
    print(*children, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


class Writers:
    """A process that writes caches in children of its own, one or several a cache."""

    def __init__(self, pair: Path) -> None:
        script = WRITER.format(threads=torch.get_num_threads(), pair=str(pair), settings=SETTINGS, few=FEW)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(Path(writing.__file__).parents[2])},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def start(self, out: Path, size: int) -> list[int]:
        """The ids of `size` processes that begin to write `out`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.process.stdin.write(f"{out} {size} {free.getsockname()[1]}\n")
        return self._numbers()

    def ended(self) -> list[int]:
        """Their exit codes, when all have ended."""
        return self._numbers()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def _numbers(self) -> list[int]:
        return [int(number) for number in self.process.stdout.readline().split()]


@pytest.fixture(scope="module")
def writers(tiny_folder):
    started = Writers(tiny_folder)
    yield started
    started.close()


def kill(process: int, out: Path, after: float) -> None:
    """Kill it `after` seconds from when the first shard is there."""
    deadline = time.monotonic() + 30
    while not (out / "shard-00000.h5").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)


def finished(out: Path) -> bool:
    manifest = out / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text())["complete"]


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_any_moment_then_again_equals_uninterrupted(tiny, whole, tmp_path, writers, seed):
    out = tmp_path / "mine"
    (process,) = writers.start(out, 1)
    kill(process, out, random.Random(seed).uniform(0, 0.5))
    assert writers.ended() == [-signal.SIGKILL]
    assert not finished(out), "killed too late to say anything"
    write(tiny, out)
    assert contents(out) == contents(whole)


def test_two_processes_write_the_bytes_of_one(whole, tmp_path, writers):
    writers.start(tmp_path / "mine", 2)
    assert writers.ended() == [0, 0]
    assert contents(tmp_path / "mine") == contents(whole)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_of_two_processes_ends_the_other_and_leaves_what_resumes(
    tiny, whole, tmp_path, writers, victim
):
    out = tmp_path / "mine"
    kill(writers.start(out, 2)[victim], out, 0.05)
    assert writers.ended()[victim] == -signal.SIGKILL
    assert not finished(out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5") if path.with_suffix(".json").exists()}
    assert kept
    write(tiny, out)
    assert contents(out) == contents(whole)
    assert all((out / name).stat().st_mtime_ns == moment for name, moment in kept.items())


def test_sigterm_ends_in_one_line_and_the_same_command_goes_on(tiny, whole, tmp_path):
    def stop(done: int, total: int, note: str = "") -> None:
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def write_told() -> None:
        with joined(device="cpu") as world:
            write(tiny, tmp_path / "mine", on_rows=stop, world=world)

    assert refusal(SteerError, write_told).startswith("told to stop; what is finished is kept")
    assert list((tmp_path / "mine").glob("shard-*.json"))
    write(tiny, tmp_path / "mine")
    assert contents(tmp_path / "mine") == contents(whole)
