"""How good the trainers' dictionaries are at equal rows, in the same order: held-out FVE, dead features, planted ones.

    python experiments/benchmarks/sae_quality.py saelens real 1e-3     # one run; its piece is kept and found again
    python experiments/benchmarks/sae_quality.py ours real
    python experiments/benchmarks/sae_quality.py                       # joins the pieces: sae_quality.json

Every run reads 1,015,808 rows once in batches of 4096 (ours: its documented batch), d_sae 4096, k 40. FVE needs no
quiet machine. The time to the same FVE is rows needed / the rows/s measured on a quiet one (SAELens under autocast by
sae_speed.py, ours at its documented batch by sae_scaling.py); rows needed are those of the shortest whole run of ours
that reaches SAELens's best FVE, once with our defaults and once with whatever rate and decay were tried.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from isa import as_asked, machine, record_path
from sae_peers import dictionary_learning as dictionary_learning_trainer
from sae_peers import figures, ours, saelens, sparsify, versions
from sae_rows import FOLDER, StoredRows, known_features
from torch.nn.functional import normalize

from sae_steer.records import provenance, read_json, write_json
from sae_steer.settings import SAESettings

HERE = Path(__file__).parent
PIECES = FOLDER / "pieces"
D_SAE, K, BATCH = 4096, 40, 4096
RATES = (3e-4, 1e-3, 3e-3)


def run(
    trainer: str, data: str, lr: float | None, *, rows: int | None, autocast: bool, chosen: dict[str, float]
) -> dict:
    """Train one dictionary and measure it on held-out rows."""
    source, held_out = StoredRows.open(f"{data}-train"), StoredRows.open(f"{data}-held-out")
    rows = rows or source.n_rows
    shape = {"d_in": source.d_in, "d_sae": D_SAE, "k": K, "batch_size": BATCH}
    settings = SAESettings(d_sae=D_SAE, k=K, rows=rows, lr=lr, **chosen)
    if trainer == "ours":
        made, size = ours(source, settings), settings.batch_size
    else:
        size = BATCH
        made = {
            "saelens": lambda: saelens(**shape, rows=rows, lr=lr, autocast=autocast, first=source.batches(BATCH)),
            "dictionary_learning": lambda: dictionary_learning_trainer(**shape, rows=rows, lr=lr),
            "sparsify": lambda: sparsify(**shape, lr=lr),
        }[trainer]()
    start = time.process_time()
    for step in range(rows // size):
        made.step(source.batch(step, size, 0))
        if step % 20 == 0:
            print(trainer, data, lr, step * size, "rows", flush=True)
    spent = time.process_time() - start
    encode, decode, directions = made.finish()
    found = figures(encode, decode, held_out.batches(BATCH), D_SAE)
    if data == "synthetic":
        found["mean_max_cosine"] = mean_max_cosine(directions())
    return {"trainer": trainer, "data": data, "lr": lr, "trained_rows": rows, "batch_size": size,
            "autocast": autocast, "chosen": chosen, "cpu_seconds": spent, "settings": dataclasses.asdict(settings)
            if trainer == "ours" else None, **found}  # fmt: skip


def mean_max_cosine(directions: torch.Tensor) -> float:
    """Over the known features, the mean of the best cosine any dictionary row has with one."""
    return float((known_features() @ normalize(directions.float(), dim=1).T).max(1).values.mean())


def piece(
    trainer: str, data: str, lr: float | None, rows: int | None, autocast: bool, chosen: dict[str, float]
) -> Path:
    """Where a run's figures are kept."""
    parts = [trainer, data, lr and f"{lr:g}", rows, autocast and "autocast", *(f"{k}-{v:g}" for k, v in chosen.items())]
    return PIECES / f"quality-{'-'.join(str(part) for part in parts if part)}.json"


def join() -> dict:
    """All runs, and what the issue asks of them."""
    runs = [read_json(path) for path in sorted(PIECES.glob("quality-*.json"))]
    record = {
        "provenance": provenance(settings={"d_sae": D_SAE, "k": K, "rates": RATES}, inputs={}),
        "versions": versions(),
        "machine": machine(),
        "runs": runs,
    }
    for data in ("real", "synthetic"):
        record[data] = compared([one for one in runs if one["data"] == data])
    return record


def compared(runs: list[dict]) -> dict | None:
    """Ours against SAELens's best rate, at the most rows both read; None while one of them is missing."""
    rows = {name: {one["trained_rows"] for one in runs if one["trainer"] == name} for name in ("ours", "saelens")}
    if not (shared := rows["ours"] & rows["saelens"]):
        return None
    equal = [one for one in runs if one["trained_rows"] == max(shared)]
    theirs = [one for one in equal if one["trainer"] == "saelens"]
    best = max(theirs, key=lambda one: one["fve"])
    own = next(one for one in equal if one["trainer"] == "ours" and is_default(one))
    reached = [one for one in runs if one["trainer"] == "ours" and one["fve"] >= best["fve"]]
    seconds = max(shared) / read_json(HERE / "sae_speed.json")["rows_per_second"]["saelens_autocast"]
    found = {
        "rows": max(shared),
        "saelens_rates_tried": sorted(one["lr"] for one in theirs),
        "saelens_best_rate": best["lr"],
        "fve_difference": own["fve"] - best["fve"],
        "seconds_of_saelens": seconds,
        "to_saelens_fve_by_defaults": soonest([one for one in reached if is_default(one)], seconds),
        "to_saelens_fve": soonest(reached, seconds),
    }
    for name in ("fve", "dead", "mean_max_cosine"):
        if name in own:
            found |= {name: own[name], f"{name}_saelens": best[name]}
    return found


def is_default(one: dict) -> bool:
    """Whether a run of ours is one at our documented rate and decay."""
    return one["lr"] is None and not one.get("chosen")


def soonest(runs: list[dict], seconds_of_saelens: float) -> dict | None:
    """The shortest of our runs, and in how much less time it is done."""
    if not runs:
        return None
    run = min(runs, key=lambda one: one["trained_rows"])
    seconds = run["trained_rows"] / read_json(HERE / "sae_scaling.json")["by_width"][0]["ours"]
    known = {name: run[name] for name in ("trained_rows", "lr", "fve", "dead")}
    return {**known, "chosen": run.get("chosen"), "seconds": seconds, "ratio": seconds_of_saelens / seconds}


def main() -> None:
    """Make one piece, or join them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", nargs="?", choices=("ours", "saelens", "dictionary_learning", "sparsify"))
    parser.add_argument("data", nargs="?", choices=("real", "synthetic"))
    parser.add_argument("lr", nargs="?", type=float)
    parser.add_argument("--rows", type=int, help="a shorter run")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--decay", type=float, help="of ours alone; by default the documented one")
    asked = parser.parse_args()
    if asked.decay is not None and asked.trainer != "ours":
        parser.error("--decay is of ours alone")
    if asked.trainer is None:
        print(write_json(record_path(__file__), join()))
        return
    chosen = {} if asked.decay is None else {"decay": asked.decay}
    path = piece(asked.trainer, asked.data, asked.lr, asked.rows, asked.autocast, chosen)
    if not path.is_file():
        found = run(asked.trainer, asked.data, asked.lr, rows=asked.rows, autocast=asked.autocast, chosen=chosen)
        write_json(path, found)
    print(path)


if __name__ == "__main__":
    as_asked()
    main()
