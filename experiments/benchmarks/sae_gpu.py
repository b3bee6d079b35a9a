"""Rows a second on a GPU, ours against SAELens in fp32 and under autocast, at several widths.

    python experiments/benchmarks/sae_gpu.py        # a minute on a CUDA device; writes sae_gpu.json

Rows are drawn on the spot (sums of known directions), so that the script needs nothing but the package.
"""

import sys
from dataclasses import dataclass

import torch
from isa import as_asked, machine, record_path
from jaxtyping import Float
from sae_peers import encoder_seconds, ours, saelens, seconds_a_step, versions
from sae_rows import synthetic
from torch import Tensor

from sae_steer.records import provenance, write_json
from sae_steer.settings import SAESettings

WIDTHS, K, BATCH, ROWS = (4096, 16384, 65536), 40, 4096, 1_015_808


@dataclass(frozen=True)
class Drawn:
    """A few batches again and again: a `RowSource` for timing."""

    rows: Float[Tensor, "row d_in"]
    fingerprint: str = "drawn"
    n_rows: int = ROWS

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.rows.shape[1]

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """The mean row."""
        return self.rows.mean(0)

    @property
    def mean_square(self) -> float:
        """Mean squared distance of a row from the mean row."""
        return float((self.rows - self.mean).square().sum(1).mean())

    def batch(self, step: int, batch_size: int, seed: int) -> Float[Tensor, "batch d_in"]:
        """The batch of a step."""
        return self.rows[step * batch_size % len(self.rows) :][:batch_size]


def point(source: Drawn, d_sae: int) -> dict:
    """Rows/s of the three at a width."""
    batches = [source.batch(step, BATCH, 0).cuda() for step in range(4)]
    theirs = {"d_in": source.d_in, "d_sae": d_sae, "k": K, "rows": ROWS, "batch_size": BATCH, "device": "cuda"}
    trainers = {
        "ours": ours(source, SAESettings(d_sae=d_sae, k=K, rows=ROWS, batch_size=BATCH), device="cuda"),
        "saelens_fp32": saelens(**theirs, autocast=False, first=iter(batches * 3)),
        "saelens_autocast": saelens(**theirs, autocast=True, first=iter(batches * 3)),
    }
    seconds = {name: seconds_a_step(one, batches, warm=10, rounds=10) for name, one in trainers.items()}
    bound = encoder_seconds(BATCH, source.d_in, d_sae, device="cuda")
    return {
        "d_sae": d_sae,
        "rows_per_second": {name: BATCH / spent for name, spent in seconds.items()},
        "share_of_encoder_bound": bound / seconds["ours"],
        **{f"ratio_to_{name}_d{d_sae}": spent / seconds["ours"] for name, spent in seconds.items() if name != "ours"},
    }


def main() -> None:
    """Every width, on the first device."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; run this where there is one")
    source = Drawn(torch.from_numpy(synthetic(4 * BATCH, 0)).float())
    points = [point(source, d_sae) for d_sae in WIDTHS]
    record = {
        "provenance": provenance(settings={"k": K, "batch_size": BATCH}, inputs={}),
        "versions": versions(),
        "machine": machine(),
        "device": torch.cuda.get_device_name(),
        "points": points,
    }
    print(write_json(record_path(__file__), record))


if __name__ == "__main__":
    as_asked()
    main()
