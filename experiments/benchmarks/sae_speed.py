"""Rows a second of the trainers at 512 -> 4096, k 40, batches of 4096 real rows, on an otherwise idle machine.

    quiet /tmp/venv-peers/bin/python experiments/benchmarks/sae_speed.py     # two minutes; writes sae_speed.json

`auxk`: a feature silent for one batch counts as dead, so that the auxiliary loss takes part in every step; without
it none is dead yet. The bound is the encoder's product alone in bfloat16. sae_peers.py says how to get the peers.
"""

import argparse
import json
from collections.abc import Callable

import torch
from isa import as_asked, machine, record_path
from sae_peers import (
    DEAD_ROWS,
    dictionary_learning,
    encoder_seconds,
    in_own_process,
    ours,
    saelens,
    seconds_a_step,
    sparsify,
    versions,
)  # fmt: skip
from sae_rows import StoredRows

from sae_steer.records import provenance, write_json
from sae_steer.settings import SAESettings

D_SAE, K, BATCH, ROWS = 4096, 40, 4096, 1_015_808


def cases(source: StoredRows) -> dict[str, tuple[Callable, int]]:
    """Name -> (trainer to set up, timed steps)."""
    shape = {"d_in": source.d_in, "d_sae": D_SAE, "k": K, "batch_size": BATCH}
    own = {"d_sae": D_SAE, "k": K, "rows": ROWS, "batch_size": BATCH}

    def theirs(autocast: bool, dead_rows: int = DEAD_ROWS) -> Callable:
        return lambda: saelens(**shape, rows=ROWS, autocast=autocast, first=source.batches(BATCH), dead_rows=dead_rows)

    return {
        "ours": (lambda: ours(source, SAESettings(**own)), 40),
        "ours_fp32": (lambda: ours(source, SAESettings(**own, precision="float32")), 12),
        "ours_auxk": (lambda: ours(source, SAESettings(**own, dead_after_rows=1)), 40),
        "saelens_fp32": (lambda: theirs(False)(), 5),
        "saelens_autocast": (lambda: theirs(True)(), 6),
        "saelens_autocast_auxk": (lambda: theirs(True, BATCH)(), 5),
        "dictionary_learning_fp32": (lambda: dictionary_learning(**shape, rows=ROWS), 5),
        "sparsify_fp32": (lambda: sparsify(**shape), 5),
    }


def timed(name: str) -> dict:
    """Seconds a step of one trainer, or why it could not be set up."""
    source = StoredRows.open("real-train")
    make, steps = cases(source)[name]
    batches = [source.batch(step, BATCH, 0) for step in range(8)]
    try:
        trainer = make()
    except ImportError as error:
        return {"missing": f"{name}: {error}"}
    return {"seconds": seconds_a_step(trainer, batches[:steps], rounds=max(1, steps // len(batches)))}


def main() -> None:
    """Time every trainer in turn, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="only time this one, and print it")
    if case := parser.parse_args().case:
        print(json.dumps(timed(case)))
        return
    source = StoredRows.open("real-train")
    bound = encoder_seconds(BATCH, source.d_in, D_SAE)
    found = {}
    for name in cases(source):
        found[name] = in_own_process(__file__, "--case", name)
        print(name, found[name], flush=True)
    seconds = {name: one["seconds"] for name, one in found.items() if "seconds" in one}
    missing = [one["missing"] for one in found.values() if "missing" in one]
    record = {
        "provenance": provenance(
            settings={"d_sae": D_SAE, "k": K, "batch_size": BATCH}, inputs={"rows": source.fingerprint}
        ),
        "versions": versions(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "rows_per_second": {name: BATCH / spent for name, spent in seconds.items()},
        "encoder_bound_rows_per_second": BATCH / bound,
        "share_of_encoder_bound": bound / seconds["ours"],
        "not_installed": missing,
    }
    for peer in ("saelens_fp32", "saelens_autocast", "dictionary_learning_fp32", "sparsify_fp32"):
        if peer in seconds:
            record[f"ratio_to_{peer}"] = seconds[peer] / seconds["ours"]
    record["ratio_to_saelens_autocast_auxk"] = seconds["saelens_autocast_auxk"] / seconds["ours_auxk"]
    print(write_json(record_path(__file__), record))


if __name__ == "__main__":
    as_asked()
    main()
