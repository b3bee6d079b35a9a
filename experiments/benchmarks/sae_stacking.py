"""Three seeds learned together against one after another, over the same rows.

    quiet python experiments/benchmarks/sae_stacking.py       # a minute; writes sae_stacking.json

Batches of 4096 real rows, k 40. Timed in turn, so that both see the same machine; `gain` above 1 means that
together is faster.
"""

import statistics
import time

from isa import as_asked, machine, record_path
from sae_peers import ours
from sae_rows import StoredRows

from sae_steer.records import provenance, write_json
from sae_steer.settings import SAESettings

WIDTHS, SEEDS, BATCH, STEPS = (512, 1024, 4096), (0, 1, 2), 4096, 12


def measured(source: StoredRows, d_sae: int) -> dict:
    """Seconds a step of all three, and the gain; reading the batch counts, as it is shared."""
    jobs = [SAESettings(d_sae=d_sae, k=40, rows=1_015_808, batch_size=BATCH, seed=seed) for seed in SEEDS]
    together, apart = ours(source, *jobs), [ours(source, job) for job in jobs]
    spent: dict[str, list[float]] = {"together": [], "apart": []}
    for step in range(STEPS):
        start = time.perf_counter()
        together.step(source.batch(step, BATCH, 0))
        middle = time.perf_counter()
        for one in apart:
            one.step(source.batch(step, BATCH, 0))
        spent["together"].append(middle - start)
        spent["apart"].append(time.perf_counter() - middle)
    found = {name: statistics.median(times[2:]) for name, times in spent.items()}
    found |= {"d_sae": d_sae, "gain": found["apart"] / found["together"]}
    print(found, flush=True)
    return found


def main() -> None:
    """Every width."""
    source = StoredRows.open("real-train")
    points = [measured(source, d_sae) for d_sae in WIDTHS]
    record = {
        "provenance": provenance(settings={"batch_size": BATCH, "seeds": SEEDS}, inputs={"rows": source.fingerprint}),
        "machine": machine(),
        "points": points,
    }
    for one in points:
        record[f"ratio_to_one_after_another_d{one['d_sae']}"] = one["gain"]
    print(write_json(record_path(__file__), record))


if __name__ == "__main__":
    as_asked()
    main()
