"""Two commands at once into one folder: one makes its output whole, the other is refused in one line or finds it.

Both start together, with equal settings or with others. Afterwards the folder must hold, byte for byte, what one of
the two makes alone, and each command that ended well must say so of that output.

    python experiments/benchmarks/attack_races.py            # attack_races.json
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import attack
from attack import COMMANDS, Record, contents, forked, inside, run


@dataclass(frozen=True)
class Race:
    """Two commands that write into one folder."""

    name: str
    needs: tuple[str, ...]
    makes: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    races: int


def races() -> list[Race]:
    """Every command against itself, with equal settings and with others."""
    cache, sae, scan = "activations/toy", "runs/toy/saes", "runs/toy/scan"
    one = COMMANDS
    return [
        Race("cache", ("toy",), cache, one["cache"], one["cache"], 6),
        Race("cache, other seed", ("toy",), cache, one["cache"], (*one["cache"], "--seed", "1"), 8),
        Race("train-sae", ("toy", cache), sae, one["train-sae"], one["train-sae"], 6),
        Race("train-sae, other rate", ("toy", cache), sae, one["train-sae"], (*one["train-sae"], "--lr", "1e-4"), 10),
        Race("train-sae, forced", ("toy", cache), sae, (*one["train-sae"], "--force"),
             (*one["train-sae"], "--lr", "1e-4", "--force"), 8),
        Race("scan, other rate", ("toy", cache, sae), scan, one["scan"], (*one["scan"], "--min-rate", "0.2"), 8),
        Race("intervene", ("toy", cache, sae, scan), "runs/toy/intervene", one["intervene"], one["intervene"], 4),
        Race("layers, other seed", ("toy", cache), "runs/toy/layers", one["layers"], (*one["layers"], "--seed", "1"),
             6),
        Race("report", ("toy", "runs/toy"), "runs/toy", one["report"], one["report"], 6),
        Race("train-pair, other seed", (), "trained", one["train-pair"], (*one["train-pair"], "--seed", "1"), 8),
    ]  # fmt: skip


def main() -> None:
    """Race until every pair of commands has had its races."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--base", type=Path, default=Path(tempfile.gettempdir()) / "sae-steer-attack")
    parser.add_argument("--share", type=float, default=1.0, help="Of the races; less for a first look.")
    asked = parser.parse_args()
    record = Record.open(asked.out)
    with attack.tiny_training():
        base = attack.workplace(asked.base)
        for one in races():
            run_races(one, base, record, max(1, round(one.races * asked.share)))
    print(asked.out)
    if record.bad:
        sys.exit(f"{len(record.bad)} races did not end as they should")


def run_races(race: Race, base: Path, record: Record, count: int) -> None:
    """Races of one kind until there were enough."""
    if record.done(race.name) >= count:
        return
    draw = random.Random(f"{race.name} {record.done(race.name)}")
    with tempfile.TemporaryDirectory() as scratch:
        alone, spans = [], []
        for number, arguments in enumerate((race.first, race.second)):
            with inside(prepare(race, base, Path(scratch) / f"alone{number}")):
                outcome = forked(lambda arguments=arguments: run(*arguments))
                assert outcome.code == 0, outcome
                alone.append(contents(Path(race.makes)))
                spans.append(outcome.seconds)
        while record.done(race.name) < count:
            folder = prepare(race, base, Path(scratch) / "race")
            with inside(folder):
                running = [attack.start(lambda: run(*race.first))]
                time.sleep(draw.uniform(0, min(spans)) * draw.choice([0, 1]))
                running.append(attack.start(lambda: run(*race.second)))
                outcomes = [attack.finish(*one) for one in running]
                made = contents(Path(race.makes))
            judge(race, outcomes, made, alone, record)
            shutil.rmtree(folder)
            print(race.name, record.tries[race.name], file=sys.stderr, flush=True)


def judge(race: Race, outcomes: list, made: dict, alone: list, record: Record) -> None:
    """Whether one output is there, whole, and whoever ended well made it, found it, or was followed by the other."""
    codes = [outcome.code for outcome in outcomes]
    said = {"codes": codes, "said": [outcome.said[-400:] for outcome in outcomes]}
    whole = [made == one for one in alone]
    if not all(code == 0 or outcome.is_told for code, outcome in zip(codes, outcomes, strict=True)):
        record.add(race.name, "ended badly", bad=said)
    elif 0 not in codes:
        record.add(race.name, "nobody made it", bad=said)
    elif not any(whole[number] for number, code in enumerate(codes) if code == 0):
        record.add(race.name, "mixed", bad=said)
    else:
        record.add(race.name, "both ended well" if codes == [0, 0] else "one refused")


def prepare(race: Race, base: Path, folder: Path) -> Path:
    """What both need, in a folder of its own."""
    folder.mkdir()
    for name in race.needs:
        shutil.copytree(base / name, folder / name)
    if race.makes not in race.needs:
        shutil.rmtree(folder / race.makes, ignore_errors=True)
    return folder


if __name__ == "__main__":
    main()
