"""How the cost of a step grows with width and k, and what memory the widest takes; ours and SAELens under autocast.

    quiet python experiments/benchmarks/sae_scaling.py        # three minutes; writes sae_scaling.json

Batches of 2048 real rows. `growth` is the time of a step over that at the first width, beside that of the encoder's
product. Memory: each trainer takes three steps at 512 -> 65536 in a process of its own; the figure is the peak of
its anonymous pages (memory-mapped rows count for nobody) above what it held before it was set up.
"""

import argparse
import json
import threading
import time
from pathlib import Path

from isa import as_asked, machine, record_path
from sae_peers import encoder_seconds, in_own_process, ours, saelens, seconds_a_step, versions
from sae_rows import StoredRows

from sae_steer.records import provenance, write_json
from sae_steer.settings import SAESettings

WIDTHS, KS, BATCH, ROWS, WIDEST = (4096, 16384, 65536), (20, 40, 80, 160), 2048, 1_015_808, 65536


def trainer(library: str, source: StoredRows, d_sae: int, k: int):
    """A fresh one."""
    if library == "ours":
        return ours(source, SAESettings(d_sae=d_sae, k=k, rows=ROWS, batch_size=BATCH))
    return saelens(
        d_in=source.d_in, d_sae=d_sae, k=k, rows=ROWS, batch_size=BATCH, autocast=True, first=source.batches(BATCH)
    )


def timed(library: str, d_sae: int, k: int) -> dict:
    """Seconds a step of one library."""
    source = StoredRows.open("real-train")
    batches = [source.batch(step, BATCH, 0) for step in range(6)]
    some = {"ours": 6, "saelens": 3 if d_sae < WIDEST else 2}[library]
    return {"seconds": seconds_a_step(trainer(library, source, d_sae, k), batches[:some], warm=1 + (library == "ours"))}


def point(source: StoredRows, d_sae: int, k: int) -> dict:
    """Rows/s of both at a width and a k."""
    own, theirs = (in_own_process(__file__, "--time", library, d_sae, k)["seconds"] for library in ("ours", "saelens"))
    found = {
        "d_sae": d_sae, "k": k, "ours": BATCH / own, "saelens_autocast": BATCH / theirs, "ratio": theirs / own,
        "seconds": own, "encoder_seconds": encoder_seconds(BATCH, source.d_in, d_sae, repeats=8),
    }  # fmt: skip
    print(found, flush=True)
    return found


def anonymous() -> int:
    """Bytes of this process's anonymous pages."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def peak_memory(library: str) -> dict:
    """Bytes above the start, sampled every five milliseconds while three steps run."""
    source = StoredRows.open("real-train")
    batch, start, peak, done = source.batch(0, BATCH, 0), anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    made = trainer(library, source, WIDEST, 40)
    for _ in range(3):
        made.step(batch)
    done.set()
    watcher.join()
    return {"bytes": peak[0] - start}


def main() -> None:
    """The table, then the memory of each library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", choices=("ours", "saelens"), help="only measure this one's memory, and print it")
    parser.add_argument("--time", nargs=3, metavar=("LIBRARY", "D_SAE", "K"), help="only time this, and print it")
    asked = parser.parse_args()
    if asked.memory:
        print(json.dumps(peak_memory(asked.memory)))
        return
    if asked.time:
        library, d_sae, k = asked.time
        print(json.dumps(timed(library, int(d_sae), int(k))))
        return
    source = StoredRows.open("real-train")
    by_width = [point(source, d_sae, 40) for d_sae in WIDTHS]
    by_k = [point(source, WIDTHS[0], k) for k in KS]
    memory = {name: in_own_process(__file__, "--memory", name) for name in ("ours", "saelens")}
    record = {
        "provenance": provenance(settings={"batch_size": BATCH}, inputs={"rows": source.fingerprint}),
        "versions": versions(),
        "machine": machine(),
        "by_width": by_width,
        "by_k": by_k,
        "growth_with_width": by_width[-1]["seconds"] / by_width[0]["seconds"],
        "growth_of_encoder": by_width[-1]["encoder_seconds"] / by_width[0]["encoder_seconds"],
        "growth_with_k": by_k[-1]["seconds"] / by_k[0]["seconds"],
        "peak_memory_65536": memory,
        "share_of_saelens_memory": memory["ours"]["bytes"] / memory["saelens"]["bytes"],
    }
    for one in by_width:
        record[f"ratio_to_saelens_autocast_d{one['d_sae']}"] = one["ratio"]
    for one in by_k:
        record[f"ratio_to_saelens_autocast_k{one['k']}"] = one["ratio"]
    print(write_json(record_path(__file__), record))


if __name__ == "__main__":
    as_asked()
    main()
