"""Rows of one stream in a cache: all of them in order, and those that count in shuffled batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.cache.layout import BLOCK
from sae_steer.cache.shuffle import Shuffle
from sae_steer.cache.storage import decoded
from sae_steer.cache.stored import StoredRows
from sae_steer.errors import InputError
from sae_steer.randomness import Stream, generator
from sae_steer.row_filter import RowsThatCount, every_row

AT_ONCE = 4_096
"""Rows left out whose moments are taken together."""


@dataclass(frozen=True)
class ActivationRows:
    """Rows of one stream: in order, or in shuffled batches whose whole state is the step."""

    maps: tuple[StoredRows | np.ndarray, ...]
    sums: Float[np.ndarray, " d_model"]
    squares: Float[np.ndarray, " d_model"]
    fingerprint: str
    chosen: RowsThatCount | None = None
    """Which rows count, for training and figures; None for all."""

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.maps[0].shape[1]

    @cached_property
    def selection(self) -> RowsThatCount:
        """Which rows count, of all that are stored."""
        return every_row(sum(map(len, self.maps))) if self.chosen is None else self.chosen

    @property
    def counts(self) -> Bool[np.ndarray, " row"]:
        """Whether each row that is stored counts."""
        return self.selection.counts

    @cached_property
    def n_rows(self) -> int:
        """Rows that count."""
        return int(self.counts.sum())

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """The mean of the rows that count, long ones aside."""
        rows, sums, _ = self._typical
        return torch.from_numpy(sums / rows).float()

    @property
    def mean_square(self) -> float:
        """Mean squared distance of those rows from their mean."""
        rows, sums, squares = self._typical
        return float((squares / rows - (sums / rows) ** 2).sum())

    @cached_property
    def _typical(self) -> tuple[int, Float[np.ndarray, " d_model"], Float[np.ndarray, " d_model"]]:
        """How many rows are typical, their sum and their sum of squares: those of all rows less the others'."""
        rows, sums, squares = len(self.counts), self.sums.copy(), self.squares.copy()
        others = np.flatnonzero(~self.selection.typical)
        for start in range(0, len(others), AT_ONCE):
            exact = self.take(others[start : start + AT_ONCE]).double().numpy()
            sums, squares = sums - exact.sum(0), squares - (exact**2).sum(0)
        if rows == len(others):
            raise InputError("no row counts: all are of special tokens; cache texts, or keep them")
        return rows - len(others), sums, squares

    def in_order(self, size: int = 8_192) -> Iterator[Float[Tensor, "row d_model"]]:
        """Every row that is stored, float32, in chunks; `counts` says which count."""
        for part in self.maps:
            for start in range(0, len(part), size):
                yield torch.from_numpy(decoded(part[start : start + size]))

    def that_count(self, size: int = 8_192) -> Iterator[Float[Tensor, "row d_model"]]:
        """The rows that count, float32, in chunks."""
        start = 0
        for rows in self.in_order(size):
            yield rows[torch.from_numpy(self.counts[start : start + len(rows)])]
            start += len(rows)

    def take(self, rows: np.ndarray) -> Float[Tensor, "row d_model"]:
        """The rows of these numbers (rising) among all that are stored, float32."""
        ends = np.cumsum([len(part) for part in self.maps])
        starts = ends - [len(part) for part in self.maps]
        inside = [rows[(rows >= start) & (rows < end)] - start for start, end in zip(starts, ends, strict=True)]
        chosen = [part[chosen] for part, chosen in zip(self.maps, inside, strict=True)]
        return torch.from_numpy(decoded(np.concatenate(chosen)))

    def batch(self, step: int, batch_size: int, seed: int) -> Float[Tensor, "batch d_model"]:
        """Batch `step` of a seeded shuffle of all blocks of rows that count, a new one every epoch.

        Left out are a shard's last rows that fill no block, and of each epoch the blocks that fill no batch.
        """
        per_batch, n_blocks = batch_size // BLOCK, int(self._block_ends[-1])
        if batch_size % BLOCK or not 0 < per_batch <= n_blocks:
            raise InputError(
                f"a batch of {batch_size} rows cannot be cut from {self.n_rows} rows in blocks of {BLOCK}; "
                "choose a smaller multiple of it, or cache more texts"
            )
        epoch, within = divmod(step, n_blocks // per_batch)
        key = torch.randint(2**62, (), generator=generator(seed, epoch, Stream.ROW_ORDER)).item()
        blocks = Shuffle(n_blocks, key)(np.arange(within * per_batch, (within + 1) * per_batch))
        parts = np.searchsorted(self._block_ends, blocks, side="right")
        starts = (blocks - np.concatenate([[0], self._block_ends])[parts]) * BLOCK
        batch = np.empty((batch_size, self.d_in), dtype=self.maps[0].dtype)
        for slot, (part, start) in enumerate(zip(parts.tolist(), starts.tolist(), strict=True)):
            self._read_block(batch[slot * BLOCK : (slot + 1) * BLOCK], part, start)
        return torch.from_numpy(decoded(batch))

    def _read_block(self, out: np.ndarray, part: int, start: int) -> None:
        """Fill `out` with the rows that count from the `start`-th of them on: one read, of the rows between too."""
        if self._numbers is None:
            self.maps[part].read_into(out, start)
            return
        numbers = self._numbers[part][start : start + len(out)]
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == len(out):
            self.maps[part].read_into(out, first)
        else:
            span = np.empty((last - first + 1, self.d_in), out.dtype)
            self.maps[part].read_into(span, first)
            span.take(numbers - first, axis=0, out=out, mode="clip")  # any other mode copies through a buffer

    @cached_property
    def _numbers(self) -> list[Int[np.ndarray, " row"]] | None:
        """The numbers of the rows that count in each shard; None where all do."""
        if self.counts.all():
            return None
        ends = np.cumsum([len(part) for part in self.maps])[:-1]
        return [np.flatnonzero(part) for part in np.split(self.counts, ends)]

    @cached_property
    def _block_ends(self) -> Int[np.ndarray, " shard"]:
        """Whole blocks of rows that count, in the shards up to each."""
        return np.cumsum([len(part) // BLOCK for part in (self._numbers or self.maps)])
