"""What caching costs as rows and layers grow: 0.1 to 10 million rows, and one to six layers asked.

Rows: two one-layer models of width 16 with random weights, so that ten million rows take minutes; so this is the cost
of dealing, batching, storing and checksums, which is what could grow faster than the rows. Layers: the 23M shape,
20,000 rows.

    python experiments/benchmarks/cache_scaling.py 100_000 300_000 1_000_000     # sizes; adds to cache_scaling.json
    python experiments/benchmarks/cache_scaling.py --layers
    python experiments/benchmarks/cache_scaling.py --plot                        # cache_scaling.png
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
from cache_rows import RepeatedTexts, anonymous_megabytes, random_pair
from isa import as_asked, machine, record_path

from sae_steer import cache_activations
from sae_steer.files import write_text
from sae_steer.settings import PRESETS, DecoderSettings

SHAPE = DecoderSettings(n_layers=1, n_heads=1, n_kv_heads=1, d_model=16, d_head=8, d_mlp=8, d_vocab=1029)
RECORD = record_path(__file__)


def seconds(shape: DecoderSettings, rows: int, layers: tuple[int, ...]) -> float:
    """What one whole call takes."""
    pair, folder = random_pair(shape), Path(tempfile.mkdtemp(prefix="sae-steer-scaling-"))
    assert pair.sha256  # hashed once a pair, however many rows
    try:
        start = time.perf_counter()
        cache_activations(pair, out=folder / "cache", layers=layers, source=RepeatedTexts(rows))
        return time.perf_counter() - start
    finally:
        shutil.rmtree(folder)


def slope(points: dict[str, float]) -> float:
    """The exponent of cost in size: the slope of log seconds in log size; 1 is linear."""
    sizes = np.log([int(size) for size in points])
    return float(np.polyfit(sizes, np.log(list(points.values())), 1)[0])


def plot(record: dict) -> None:
    """Both curves, with the line through the last point and the origin."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key, label in zip(axes, ("rows", "layers"), ("rows", "layers asked"), strict=True):
        sizes, taken = [int(size) for size in record[key]], list(record[key].values())
        axis.plot(sizes, taken, "o-", label="measured")
        axis.plot([sizes[0], sizes[-1]], [taken[-1] * sizes[0] / sizes[-1], taken[-1]], "--", label="in proportion")
        axis.set(xlabel=label, ylabel="seconds")
        axis.legend()
    axes[0].set(xscale="log", yscale="log", title="two models of width 16")
    axes[1].set(title="two models of the 23M shape", ylim=0, xlim=0)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, metadata={"Software": None})


def main(arguments: list[str]) -> None:
    """Measure what is asked and add it to the record."""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {"rows": {}, "layers": {}}
    if arguments == ["--plot"]:
        plot(record)
        return
    if arguments == ["--layers"]:
        seconds(PRESETS["interpgpt-23m"], 2_000, (0,))
        record["layers"] = {n: seconds(PRESETS["interpgpt-23m"], 20_000, tuple(range(n))) for n in range(1, 7)}
    else:
        seconds(SHAPE, 20_000, (0,))
        for size in map(int, arguments):
            record["rows"][str(size)] = seconds(SHAPE, size, (0,))
            record.setdefault("anonymous_megabytes", {})[str(size)] = anonymous_megabytes()
    record["machine"] = machine()
    record["rows"] = dict(sorted(record["rows"].items(), key=lambda item: int(item[0])))
    if len(record["rows"]) > 1:
        record["exponent_in_rows"] = slope(record["rows"])
    write_text(RECORD, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    as_asked()
    main(sys.argv[1:])
