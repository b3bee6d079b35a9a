"""`kill -9` at random moments of every command, again and again, until it ends alive; then every byte compared.

A round copies what the command needs, kills it at a random moment and repeats it on what is left until it comes to
its end. The outputs must then equal those of a run nobody killed. `cache` is also run by two processes, of which one
or both are killed; `train-sae` also learns two dictionaries together; and `--force` over a finished output is killed
as well, and must neither end as the old output nor begin again for ever.

    python experiments/benchmarks/attack_kills.py            # attack_kills.json
"""

import argparse
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import attack
from attack import COMMANDS, SEEDS, Outcome, Record, contents, forked, inside, run
from isa import as_asked, record_path

DRAWS = 12
"""Kills at most before a round is let through."""


@dataclass(frozen=True)
class Target:
    """A command to kill: what it needs, what it makes, and how it is run."""

    name: str
    needs: tuple[str, ...]
    makes: str
    arguments: tuple[str, ...]
    kills: int
    before: tuple[str, ...] = ()
    """Run first: the output that `--force` then replaces."""
    processes: int = 1


def targets() -> list[Target]:
    """Everything that is killed."""
    cache, sae = "activations/toy", "runs/toy/saes"
    forced = (*COMMANDS["cache"], "--seed", "1", "--force")
    relearned = (*COMMANDS["train-sae"], "--force")
    narrow = (*COMMANDS["train-sae"][:-4], "--rows", "3200", "--batch-size", "256")
    return [
        Target("cache", ("toy",), cache, COMMANDS["cache"], 60),
        Target("cache, two processes", ("toy",), cache, COMMANDS["cache"], 40, processes=2),
        Target("cache --force", ("toy",), cache, forced, 40, before=COMMANDS["cache"]),
        Target("train-sae", ("toy", cache), sae, COMMANDS["train-sae"], 60),
        Target("train-sae, two together", ("toy", cache), "seeds", SEEDS, 50),
        Target("train-sae --force", ("toy", cache), sae, relearned, 40, before=narrow),
        Target("scan", ("toy", cache, sae), "runs/toy/scan", COMMANDS["scan"], 40),
        Target("intervene", ("toy", cache, sae, "runs/toy/scan"), "runs/toy/intervene", COMMANDS["intervene"], 30),
        Target("layers", ("toy", cache), "runs/toy/layers", COMMANDS["layers"], 30),
        Target("report", ("toy", "runs/toy"), "runs/toy", COMMANDS["report"], 30),
        Target("train-pair", (), "trained", COMMANDS["train-pair"], 40),
    ]


def main() -> None:
    """Kill until every target has had its kills."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=record_path(__file__))
    parser.add_argument("--base", type=Path, default=Path(tempfile.gettempdir()) / "sae-steer-attack")
    parser.add_argument("--share", type=float, default=1.0, help="Of the kills; less for a first look.")
    parser.add_argument("--only", nargs="*", help="Targets by name.  [default: all]")
    asked = parser.parse_args()
    record = Record.open(asked.out)
    with attack.tiny_training():
        base = attack.workplace(asked.base)
        for target in [one for one in targets() if not asked.only or one.name in asked.only]:
            kill(target, base, record, max(1, round(target.kills * asked.share)), random.Random(target.name))
    print(asked.out)
    if record.bad:
        sys.exit(f"{len(record.bad)} rounds did not end as they should")


def kill(target: Target, base: Path, record: Record, kills: int, draw: random.Random) -> None:
    """Rounds of one target until it was killed `kills` times."""
    draw.seed(f"{target.name} {record.done(target.name)}")
    if record.tries.get(target.name, {}).get("killed", 0) >= kills:
        return
    with tempfile.TemporaryDirectory() as scratch:
        right, span = uninterrupted(target, base, Path(scratch) / "right")
        number = 0
        while record.tries.get(target.name, {}).get("killed", 0) < kills:
            number += 1
            folder = Path(scratch) / str(number)
            one_round(target, prepare(target, base, folder), span, right, record, draw)
            shutil.rmtree(folder)
            print(target.name, record.tries[target.name], file=sys.stderr, flush=True)


def prepare(target: Target, base: Path, folder: Path) -> Path:
    """What the command needs, in a folder of its own; what it makes is not there, or as `before` made it."""
    folder.mkdir()
    for name in target.needs:
        shutil.copytree(base / name, folder / name)
    if target.makes not in target.needs:
        shutil.rmtree(folder / target.makes, ignore_errors=True)
    else:  # a report among the records it is made of
        (folder / target.makes / "report.html").unlink(missing_ok=True)
        shutil.rmtree(folder / target.makes / "figures", ignore_errors=True)
    if target.before:
        with inside(folder):
            outcome = forked(lambda: run(*target.before))
            assert outcome.code == 0, outcome
    return folder


def uninterrupted(target: Target, base: Path, folder: Path) -> tuple[dict[str, bytes], float]:
    """What the command makes, and how long it takes."""
    with inside(prepare(target, base, folder)):
        outcome = together(target, None)
        assert outcome.code == 0, outcome
        return contents(folder / target.makes), outcome.seconds


def one_round(
    target: Target, folder: Path, span: float, right: dict[str, bytes], record: Record, draw: random.Random
) -> None:
    """Kill and repeat until it ends alive, then compare."""
    with inside(folder):
        for number in range(DRAWS + 1):
            after = draw.uniform(0, span) if number < DRAWS else None
            outcome = together(target, after, draw)
            if outcome.code == "killed":
                record.add(target.name, "killed")
                continue
            if outcome.code != 0:
                record.add(target.name, "failed", bad={"said": outcome.said[-2000:], "code": outcome.code})
                return
            break
    made = contents(folder / target.makes)
    differ = sorted(name for name in {**made, **right} if made.get(name) != right.get(name))
    if differ:
        record.add(target.name, "other bytes", bad={"differ": differ[:20]})
    else:
        record.add(target.name, "equal")


def together(target: Target, after: float | None, draw: random.Random | None = None) -> Outcome:
    """The command, in one process or two, killed after some seconds."""
    if target.processes == 1:
        return forked(lambda: run(*target.arguments), kill_after=after)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> Callable[[], Outcome]:
        def act() -> Outcome:
            os.environ |= {"WORLD_SIZE": "2", "RANK": str(number), "LOCAL_RANK": str(number)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            return run(*target.arguments)

        return act

    running = [attack.start(rank(number)) for number in range(2)]
    if after is None:
        outcomes = [attack.finish(*one) for one in running]
    else:
        assert draw is not None
        victims = draw.choice([(0,), (1,), (0, 1)])
        outcomes = [attack.finish(*running[number], kill_after=after if number == victims[0] else 0.01)
                    for number in victims]  # fmt: skip
        outcomes += [attack.finish(*one) for number, one in enumerate(running) if number not in victims]
    codes = [outcome.code for outcome in outcomes]
    if "killed" in codes and all(outcome.code in ("killed", 0) or outcome.is_told for outcome in outcomes):
        return Outcome("killed", "", max(outcome.seconds for outcome in outcomes))
    worst = next((outcome for outcome in outcomes if outcome.code != 0), outcomes[0])
    return Outcome(worst.code, worst.said, max(outcome.seconds for outcome in outcomes))


if __name__ == "__main__":
    as_asked()
    main()
