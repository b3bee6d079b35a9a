"""`kill -9` at random moments of writing a cache, again and again, until it is whole; then every byte compared.

A round starts with an empty folder. The writer (one process, or two that share the shards) is started and killed at
a random moment, started again on what is left and killed again, until it comes to its end alive. With two processes
one of them or both are killed, as the draw says, and one that is left alone has to end by itself.
The folder must then equal, byte for byte, the one an uninterrupted single process wrote.

    python experiments/benchmarks/cache_kills.py            # cache_kills.json
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from isa import as_asked, machine, record_path

from sae_steer.cache import cache_activations
from sae_steer.errors import SteerError
from sae_steer.files import write_text
from sae_steer.pair.model_pair import ModelPair, load_pair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.records import commit
from sae_steer.settings import CacheSettings, CorpusSettings
from sae_steer.world import joined

TEXTS = GeneratedTexts(CorpusSettings(train_plans=24, scan_plans=8, tune_plans=4, confirm_plans=8))
SETTINGS = CacheSettings(rows_per_shard=512, tokens_per_batch=256)
LAYERS = (1, 2)
PATIENCE = 120.0
"""Seconds after which a survivor counts as hanging."""
TOLD = 3
"""Exit code of a process that ended with a line for the user."""
FORK = multiprocessing.get_context("fork")  # nothing runs in torch before it; a new interpreter would take 5 s a kill


@dataclass
class Tally:
    """What happened in the rounds of one number of processes."""

    rounds: int = 0
    kills: int = 0
    equal: int = 0
    """Finished caches that equal the uninterrupted one."""
    told: int = 0
    """Survivors of the other process's death that ended with one line."""
    hung: int = 0
    crashed: int = 0
    """Processes that ended otherwise than whole, killed or with one line."""
    shards_at_kill: list[int] = field(default_factory=list)


def main() -> None:
    """Kill, repeat, compare, and write what came back."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="At least so many for each number of processes.")
    parser.add_argument("--out", type=Path, default=record_path(__file__))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    made_at = commit()  # known to every child, which would otherwise ask git again
    scratch = Path(tempfile.mkdtemp())
    pair, draw = load_pair("small"), random.Random(0)
    try:
        for name in ("warm", "whole"):
            start = time.monotonic()
            assert run(pair, scratch / name, 1, None, Tally()), "nobody kills this run"
        span, whole = time.monotonic() - start, contents(scratch / "whole")
        tallies = {size: rounds(pair, scratch, size, asked.kills, span, whole, draw) for size in (1, 2)}
    finally:
        shutil.rmtree(scratch)
    record = {
        "commit": made_at,
        "machine": machine(),
        "shards": len([name for name in whole if name.endswith(".h5")]),
        "bytes": sum(map(len, whole.values())),
        "seconds_uninterrupted": round(span, 2),
        **{f"processes_{size}": vars(tally) for size, tally in tallies.items()},
    }
    write_text(asked.out, json.dumps(record, indent=1) + "\n")
    print(asked.out)
    if any(tally.equal < tally.rounds or tally.hung or tally.crashed for tally in tallies.values()):
        sys.exit("a cache differs, or a process did not end as it should")


def rounds(
    pair: ModelPair, scratch: Path, size: int, kills: int, span: float, whole: dict, draw: random.Random
) -> Tally:
    """Rounds until there were `kills` kills."""
    tally = Tally()
    while tally.kills < kills:
        out = scratch / f"{size}-{tally.rounds}"
        while not run(pair, out, size, (draw, span), tally):
            pass
        tally.rounds += 1
        tally.equal += contents(out) == whole
        shutil.rmtree(out)
        print(f"{size} processes: {tally.rounds} rounds, {tally.kills} kills, {tally.equal} equal", file=sys.stderr)
    return tally


def run(pair: ModelPair, out: Path, size: int, fate: tuple[random.Random, float] | None, tally: Tally) -> bool:
    """Whether the writers came to their end alive; without a `fate` nobody kills them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joint = FORK.Semaphore(0)
    writers = [FORK.Process(target=write, args=(pair, out, rank, size, port, joint)) for rank in range(size)]
    for writer in writers:
        writer.start()
    for _ in writers:
        joint.acquire(timeout=PATIENCE)
    if fate:
        strike(writers, out, *fate, tally)
    for writer in writers:
        writer.join(PATIENCE)
        if writer.is_alive():
            tally.hung += 1
            writer.kill()
            writer.join()
    tally.told += sum(writer.exitcode == TOLD for writer in writers)
    tally.crashed += sum(writer.exitcode not in (0, TOLD, -signal.SIGKILL) for writer in writers)
    return all(writer.exitcode == 0 for writer in writers)


def strike(writers: list, out: Path, draw: random.Random, longest: float, tally: Tally) -> None:
    """Kill one of the writers or all at a random moment, unless they are done by then."""
    victims, deadline = draw.sample(writers, draw.randint(1, len(writers))), time.monotonic() + draw.uniform(0, longest)
    while time.monotonic() < deadline and any(writer.is_alive() for writer in writers):
        time.sleep(0.001)
    struck = [writer for writer in victims if writer.is_alive()]
    for writer in struck:
        writer.kill()
    if struck:
        tally.kills += len(struck)
        tally.shards_at_kill.append(len(list(out.glob("*.h5"))))


def write(pair: ModelPair, out: Path, rank: int, size: int, port: int, joint) -> None:
    """One of the processes, as torchrun would start it; two threads share the batches of each."""
    torch.set_num_threads(2)
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with joined(precision=SETTINGS.precision, device="cpu") as world:
            joint.release()
            cache_activations(pair, out=out, layers=LAYERS, settings=SETTINGS, source=TEXTS, world=world)
    except SteerError:
        sys.exit(TOLD)


def contents(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of what a cache consists of."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".sae_steer"}


if __name__ == "__main__":
    as_asked()
    main()
