"""Rows a second of the trainers at 512 -> 4096, k 40, batches of 4096 real rows, on an otherwise idle machine.

    quiet /tmp/venv-peers/bin/python experiments/benchmarks/sae_speed.py     # two minutes; writes sae_speed.json
    quiet /tmp/venv-peers/bin/python experiments/benchmarks/sae_speed.py --isa avx2        # sae_speed_avx2.json

`ours` is at our default, the precision the machine has natively. `auxk`: a feature silent for one batch counts as
dead, so that the auxiliary loss takes part in every step; without it none is dead yet. The bounds are the encoder's
product alone, by torch, in float32 and where it is native in bfloat16; ours makes most of it in int8. Every figure
comes by the clock and, under `by_processor_time`, by what all cores together spent: the one to read where other work
ran beside. sae_peers.py says how to get the peers.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from isa import as_asked, machine, record_path
from sae_peers import (
    DEAD_ROWS,
    Spent,
    dictionary_learning,
    encoder_spent,
    in_own_process,
    ours,
    saelens,
    sparsify,
    spent_a_step,
    versions,
)  # fmt: skip
from sae_rows import StoredRows

from sae_steer.capability import capability
from sae_steer.records import provenance, write_json
from sae_steer.settings import SAESettings

D_SAE, K, BATCH, ROWS = 4096, 40, 4096, 1_015_808


@dataclass(frozen=True)
class Case:
    """A trainer to time."""

    make: Callable
    steps: int
    warm: int = 2


def cases(source: StoredRows) -> dict[str, Case]:
    """By name; SAELens's auxiliary loss at the precision that is the faster one here."""
    native = capability().bfloat16
    shape = {"d_in": source.d_in, "d_sae": D_SAE, "k": K, "batch_size": BATCH}
    own = {"d_sae": D_SAE, "k": K, "rows": ROWS, "batch_size": BATCH}

    def theirs(autocast: bool, dead_rows: int = DEAD_ROWS) -> Callable:
        return lambda: saelens(**shape, rows=ROWS, autocast=autocast, first=source.batches(BATCH), dead_rows=dead_rows)

    def mine(**settings) -> Callable:
        return lambda: ours(source, SAESettings(**own, **settings))

    return {
        "ours": Case(mine(), 24),
        **({"ours_fp32": Case(mine(precision="float32"), 16)} if native else {}),
        "ours_auxk": Case(mine(dead_after_rows=1), 16),
        "saelens_fp32": Case(theirs(False), 4),
        "saelens_autocast": Case(theirs(True), 6) if native else Case(theirs(True), 1, warm=0),  # 20 s a step
        "saelens_auxk": Case(theirs(native, BATCH), 4),
        "dictionary_learning_fp32": Case(lambda: dictionary_learning(**shape, rows=ROWS), 4),
        "sparsify_fp32": Case(lambda: sparsify(**shape), 4),
    }


def timed(name: str) -> dict:
    """What a step of one trainer takes, or why it could not be set up."""
    source = StoredRows.open("real-train")
    case = cases(source)[name]
    batches = [source.batch(step, BATCH, 0) for step in range(8)]
    try:
        trainer = case.make()
    except ImportError as error:
        return {"missing": f"{name}: {error}"}
    rounds = max(1, case.steps // len(batches))
    return asdict(spent_a_step(trainer, batches[: case.steps], warm=case.warm, rounds=rounds))


def bounds(d_in: int) -> dict[str, Spent]:
    """The encoder's product alone, by precision; where bfloat16 is emulated, in float32 alone."""
    native = [torch.float32, torch.bfloat16] if capability().bfloat16 else [torch.float32]
    return {str(dtype).removeprefix("torch."): encoder_spent(BATCH, d_in, D_SAE, dtype=dtype) for dtype in native}


def compared(seconds: dict[str, float], bound: dict[str, float]) -> dict:
    """What the record says of seconds a step, by the clock or of the processors."""
    saelens_best = min(seconds["saelens_fp32"], seconds["saelens_autocast"])
    ratios = {
        f"ratio_to_{peer}": seconds[peer] / seconds["ours"]
        for peer in ("saelens_fp32", "saelens_autocast", "dictionary_learning_fp32", "sparsify_fp32")
        if peer in seconds
    }
    return {
        "rows_per_second": {name: BATCH / spent for name, spent in seconds.items()},
        "encoder_bound_rows_per_second": {precision: BATCH / spent for precision, spent in bound.items()},
        "share_of_encoder_bound": {precision: spent / seconds["ours"] for precision, spent in bound.items()},
        "ratio_to_saelens_best": saelens_best / seconds["ours"],
        "ratio_to_saelens_auxk": seconds["saelens_auxk"] / seconds["ours_auxk"],
        **ratios,
    }


def main() -> None:
    """Time every trainer in turn, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="only time this one, and print it")
    if case := parser.parse_args().case:
        print(json.dumps(timed(case)))
        return
    source, load = StoredRows.open("real-train"), os.getloadavg()[0]
    bound, results = bounds(source.d_in), {}
    for name in cases(source):
        results[name] = in_own_process(__file__, "--case", name)
        print(name, results[name], flush=True)
    spent = {name: Spent(**one) for name, one in results.items() if "missing" not in one}
    clock, processor = (
        compared(
            {name: getattr(one, kind) for name, one in spent.items()},
            {name: getattr(one, kind) for name, one in bound.items()},
        )
        for kind in ("seconds", "processor_seconds")
    )
    record = {
        "provenance": provenance(
            settings={"d_sae": D_SAE, "k": K, "batch_size": BATCH}, inputs={"rows": source.fingerprint}
        ),
        "versions": versions(),
        "machine": machine() | {"load_before_and_after": [load, os.getloadavg()[0]]},
        "threads": torch.get_num_threads(),
        **clock,
        "by_processor_time": processor,
        "not_installed": [one["missing"] for one in results.values() if "missing" in one],
    }
    print(write_json(record_path(__file__), record))


if __name__ == "__main__":
    as_asked()
    main()
