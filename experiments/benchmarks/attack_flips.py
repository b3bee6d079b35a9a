"""One bit flipped in a file of every kind, and the command that reads it: found in one line, or harmless.

Found: exit 1 with one line that says so. Harmless: exit 0 and the same bytes as from the whole file. Anything else, a
traceback, a hang, or exit 0 with other results, counts as bad. The file is put back before the next flip.

    python experiments/benchmarks/attack_flips.py            # attack_flips.json
"""

import argparse
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import attack
from attack import COMMANDS, DICTIONARY, Record, contents, forked, inside, run

SAE = f"runs/toy/saes/{DICTIONARY}"


@dataclass(frozen=True)
class Kind:
    """Files of one kind, the command that reads them, and what it makes."""

    name: str
    files: str
    """A pattern."""
    arguments: tuple[str, ...]
    makes: tuple[str, ...]
    flips: int
    gone: tuple[str, ...] = ()
    """Removed before the command, so that it has something to do."""


def kinds() -> list[Kind]:
    """Every kind of file that this package writes and reads."""
    report = COMMANDS["report"]
    scan = (*COMMANDS["scan"], "--out", "scan")
    again = ("train-sae", *COMMANDS["train-sae"][1:], "--out", "again")
    return [
        Kind("shard, scanned", "activations/toy/shard-*.h5", scan, ("scan",), 24, ("scan",)),
        Kind("shard, learned from", "activations/toy/shard-*.h5", again, ("again",), 16, ("again",)),
        Kind("shard, layers", "activations/toy/shard-*.h5", (*COMMANDS["layers"], "--out", "curves"), ("curves",), 8,
             ("curves",)),
        Kind("manifest", "activations/toy/manifest.json", scan, ("scan",), 16, ("scan",)),
        Kind("weights", f"{SAE}/sae_weights.safetensors", scan, ("scan",), 16, ("scan",)),
        Kind("config", f"{SAE}/cfg.json", scan, ("scan",), 16, ("scan",)),
        Kind("training record", f"{SAE}/training.json", report, ("runs/toy",), 10),
        Kind("firings", "seeds/*/firings.parquet", SEEDS_AGAIN, ("seeds",), 10, ("seeds/*/seed_stability.json",)),
        Kind("stability", "seeds/*/seed_stability.*", SEEDS_SCANNED, ("scan",), 14, ("scan",)),
        Kind("checkpoint", "begun/training/state.safetensors", BEGUN, ("begun",), 20),
        Kind("pair's checkpoint", "halfway/training/*.safetensors", HALFWAY, ("halfway",), 12),
        Kind("scan's record", "runs/toy/scan/feature_diff.json", report, ("runs/toy",), 10),
        Kind("scan's tables", "runs/toy/scan/*.parquet", (*COMMANDS["intervene"], "--out", "study"), ("study",), 12,
             ("study",)),
        Kind("study's record", "runs/toy/intervene/*/results.json", report, ("runs/toy",), 12),
        Kind("study's trials", "runs/toy/intervene/*/trials.parquet", COMMANDS["intervene"], ("runs/toy",), 8),
        Kind("plan", "runs/toy/intervene/*/plan.toml", report, ("runs/toy",), 12),
        Kind("layers' record", "runs/toy/layers/layers.json", report, ("runs/toy",), 10),
        Kind("pair's weights", "toy/*/model.safetensors", scan, ("scan",), 10, ("scan",)),
        Kind("trained pair's weights", "trained/*/model.safetensors", TRAINED, ("own",), 8, ("own",)),
        Kind("pair file", "toy/pair.toml", scan, ("scan",), 10, ("scan",)),
        Kind("tokenizer", "toy/tokenizer.json", scan, ("scan",), 10, ("scan",)),
    ]  # fmt: skip


SEEDS_AGAIN = attack.SEEDS
SEEDS_SCANNED = ("scan", "--pair", "toy", "--sae", f"seeds/{DICTIONARY}", "--out", "scan")
BEGUN = (*COMMANDS["train-sae"], "--out", "begun")
HALFWAY = (*COMMANDS["train-pair"][:-1], "halfway")
TRAINED = ("cache", "--pair", "trained", "--layer", "1", "--out", "own", "--train-plans", "6", "--scan-plans", "4",
           "--tune-plans", "2", "--confirm-plans", "2")  # fmt: skip


def main() -> None:
    """Flip until every kind has had its flips."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--base", type=Path, default=Path(tempfile.gettempdir()) / "sae-steer-attack")
    parser.add_argument("--share", type=float, default=1.0, help="Of the flips; less for a first look.")
    asked = parser.parse_args()
    record = Record.open(asked.out)
    with attack.tiny_training(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(attack.workplace(asked.base), Path(scratch) / "place"))
        with inside(folder):
            interrupted(BEGUN, 1.0, "begun/training/state.safetensors")
            interrupted(HALFWAY, 1.0, "halfway/training/*.safetensors")
            for kind in kinds():
                flip_kind(kind, record, max(1, round(kind.flips * asked.share)))
    print(asked.out)
    if record.bad:
        sys.exit(f"{len(record.bad)} flips were neither found nor harmless")


def interrupted(arguments: tuple[str, ...], first: float, leaves: str) -> None:
    """Run a command and kill it after it has left a checkpoint, later and later if it was too early."""
    after = first
    while not list(Path.cwd().glob(leaves)):
        shutil.rmtree(leaves.split("/")[0], ignore_errors=True)
        forked(lambda: run(*arguments), kill_after=after)
        after *= 1.15
        if (Path(leaves.split("/")[0]) / "training.json").is_file():  # too late: it was done
            shutil.rmtree(leaves.split("/")[0])
            after *= 0.7


def flip_kind(kind: Kind, record: Record, flips: int) -> None:
    """Flips of one kind until there were enough."""
    if record.done(kind.name) >= flips:
        return
    draw = random.Random(f"{kind.name} {record.done(kind.name)}")
    backup = Path(tempfile.mkdtemp())
    keep = {path.split("/")[0] for path in (kind.files, *kind.makes, *kind.gone)}
    for name in keep:
        if Path(name).exists():
            shutil.copytree(name, backup / name)
    right = attempt(kind)
    assert right[0].code == 0, (kind, right[0])
    restore(keep, backup)
    while record.done(kind.name) < flips:
        path = draw.choice(sorted(Path.cwd().glob(kind.files)))
        content, bit = bytearray(path.read_bytes()), draw.randrange(8 * path.stat().st_size)
        content[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(content)
        outcome, made = attempt(kind)
        where = {"file": str(path.relative_to(Path.cwd())), "bit": bit, "said": outcome.said[-600:]}
        if outcome.is_told and outcome.code == 1:
            record.add(kind.name, "found")
        elif outcome.code != 0:
            record.add(kind.name, str(outcome.code), bad=where)
        elif same(made, right[1], kind, str(path.relative_to(Path.cwd()))):
            record.add(kind.name, "harmless")
        else:
            record.add(kind.name, "other results", bad=where)
        restore(keep, backup)
        print(kind.name, record.tries[kind.name], file=sys.stderr, flush=True)
    shutil.rmtree(backup)


def attempt(kind: Kind) -> tuple[attack.Outcome, dict[str, bytes]]:
    """Run the command, and what it made."""
    for pattern in kind.gone:
        for path in Path.cwd().glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    outcome = forked(lambda: run(*kind.arguments))
    return outcome, {
        f"{name}/{path}": content
        for name in kind.makes
        if Path(name).is_dir()
        for path, content in contents(Path(name)).items()
    }


def same(made: dict[str, bytes], right: dict[str, bytes], kind: Kind, flipped: str) -> bool:
    """Whether the results are those of the whole file; the flipped file itself is no result."""
    return all(made.get(name) == right.get(name) for name in {**made, **right} if name != flipped)


def restore(names: set[str], backup: Path) -> None:
    """Everything as before the flip."""
    for name in names:
        shutil.rmtree(name, ignore_errors=True)
        if (backup / name).exists():
            shutil.copytree(backup / name, name)


if __name__ == "__main__":
    main()
