"""What it costs that a shard's checksum is verified when a process first opens it, on a cache of 1 GB.

Three readings of the train rows of one stream in one process: with the shards' checksums and values checked, again
(nothing has changed, so nothing is checked), and shuffled batches afterwards. The cache lies in the page cache.

    python experiments/benchmarks/cache_checks.py            # cache_checks.json
"""

import json
import shutil
import tempfile
import time
from pathlib import Path

from cache_rows import RepeatedTexts, random_pair
from isa import as_asked, machine, record_path

from sae_steer import cache_activations
from sae_steer.cache import ActivationCache, checking
from sae_steer.files import write_text
from sae_steer.records import commit
from sae_steer.settings import DecoderSettings

SHAPE = DecoderSettings(n_layers=1, n_heads=1, n_kv_heads=1, d_model=512, d_head=8, d_mlp=8, d_vocab=1029)
ROWS = 500_000
BATCH, BATCHES = 4_096, 400


def seconds(work) -> float:
    """How long `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Write the cache, open it twice, read batches, write the record."""
    folder = Path(tempfile.mkdtemp(prefix="sae-steer-checks-"))
    try:
        made = cache_activations(
            random_pair(SHAPE), out=folder / "cache", layers=(0,), source=RepeatedTexts(ROWS)
        ).folder
        checking._seen.clear()
        checking._finite.clear()
        size = sum(path.stat().st_size for path in made.iterdir())
        every = seconds(lambda: ActivationCache.open(made).verify())
        checking._seen.clear()
        first = seconds(lambda: ActivationCache.open(made).rows("adhd", 0, "train"))
        again = seconds(lambda: ActivationCache.open(made).rows("adhd", 0, "train"))
        rows = ActivationCache.open(made).rows("adhd", 0, "train")
        rows.batch(0, BATCH, 0)
        batches = seconds(lambda: [rows.batch(step, BATCH, 0) for step in range(1, BATCHES + 1)])
        record = {
            "commit": commit(),
            "machine": machine(),
            "cache": {"bytes": size, "rows": rows.n_rows, "shards": len(rows.maps)},
            "seconds_all_checksums": every,
            "seconds_first_opening": first,
            "seconds_opening_again": again,
            "gigabytes_per_second_checked": size / 1e9 / every,
            "shuffled_rows_per_second": BATCH * BATCHES / batches,
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps(record, indent=1))
    write_text(record_path(__file__), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    as_asked()
    main()
