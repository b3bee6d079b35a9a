"""Shuffled batches of 4,096 rows of 512 float16 values as float32 tensors, from a cache of more than 8 GB.

The cache is written by `cache_activations` from two one-layer models with random weights, because here reading is
measured; it is deleted afterwards. Peers read the same rows of the same shards: h5py by sorted row numbers, and a
random permutation through `numpy.memmap` one row at a time, which shuffles finer than our blocks of 16 rows.

    python experiments/benchmarks/cache_reading.py            # cache_reading.json
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from cache_rows import RepeatedTexts, anonymous_megabytes, random_pair
from isa import as_asked, machine, record_path

from sae_steer import cache_activations
from sae_steer.cache import ActivationCache, site
from sae_steer.files import write_text
from sae_steer.records import commit
from sae_steer.settings import DecoderSettings

SHAPE = DecoderSettings(n_layers=1, n_heads=1, n_kv_heads=1, d_model=512, d_head=8, d_mlp=8, d_vocab=1029)
ROWS = 4_100_000
BATCH, BATCHES, PEER_BATCHES = 4_096, 400, 8
ROOM = 2
"""Gigabytes of disk that must stay free."""


def rows_a_second(batch: Callable[[int], object], batches: int) -> float:
    """Rows a second after one batch to warm up."""
    batch(0)
    start = time.perf_counter()
    for step in range(1, batches + 1):
        batch(step)
    return BATCH * batches / (time.perf_counter() - start)


def by_h5py(cache: ActivationCache) -> Callable[[int], torch.Tensor]:
    """Batches of one shard's rows, as its documentation advises: sorted row numbers in one selection."""
    shards = [cache.folder / shard["file"] for shard in cache.manifest["shards"]]
    chance = np.random.default_rng(0)

    def batch(step: int) -> torch.Tensor:
        with h5py.File(shards[step % len(shards)], "r") as file:
            rows = file[f"adhd/{site(0)}"]
            return torch.from_numpy(rows[np.sort(chance.choice(len(rows), BATCH, replace=False))].astype(np.float32))

    return batch


def by_memmap(cache: ActivationCache) -> Callable[[int], torch.Tensor]:
    """Batches of single random rows of one shard."""
    maps = cache.rows("adhd", 0, "train").maps
    chance = np.random.default_rng(0)

    def batch(step: int) -> torch.Tensor:
        part = maps[step % len(maps)]
        return torch.from_numpy(part[chance.integers(len(part), size=BATCH)].astype(np.float32))

    return batch


def main() -> None:
    """Write the cache, read it, write the record."""
    folder = Path(tempfile.mkdtemp(prefix="sae-steer-reading-"))
    try:
        assert shutil.disk_usage(folder).free > (9 + ROOM) << 30, "needs 11 GB of free disk"
        source = RepeatedTexts(ROWS)
        cache = cache_activations(random_pair(SHAPE), out=folder / "cache", layers=(0,), source=source)
        size = sum(shard["bytes"] for shard in cache.manifest["shards"])
        rows = cache.rows("adhd", 0, "train")
        for part in rows.maps:  # into the page cache
            part[:].sum()
        ours = rows_a_second(lambda step: rows.batch(step, BATCH, 0), BATCHES)
        anonymous = anonymous_megabytes()
        resumed = ActivationCache.open(cache.folder).rows("adhd", 0, "train")
        same = all(torch.equal(rows.batch(step, BATCH, 0), resumed.batch(step, BATCH, 0)) for step in (0, 399, 5_000))
        taken = {
            "ours": ours,
            "h5py": rows_a_second(by_h5py(cache), PEER_BATCHES),
            "memmap": rows_a_second(by_memmap(cache), 20),
        }
        record = {
            "commit": commit(),
            "what": f"shuffled batches of {BATCH} x 512 float16 rows to float32 tensors, from the page cache",
            "machine": machine(),
            "cache": {"bytes": size, "rows": rows.n_rows, "shards": len(rows.maps)},
            "rows_per_second": taken,
            "ratio_to_h5py_sorted_selection": ours / taken["h5py"],
            "ratio_to_memmap_single_rows": ours / taken["memmap"],
            "anonymous_megabytes_after_reading": anonymous,
            "same_batches_after_reopening": same,
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps(record, indent=1))
    write_text(record_path(__file__), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    as_asked()
    main()
