"""Sparse codes: what a dictionary says of a batch of rows, one entry for every feature that fires in a row.

Row n of the batch owns the codes starts[n] to starts[n + 1]; rows may differ in how many they have.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class SparseCodes:
    """f of a batch: code c says that feature indices[c] has value values[c] in row rows[c]; all else is zero."""

    values: Float[Tensor, " code"]
    """A code may be zero, where a row has fewer than k features above it, and below zero in dictionaries of SAELens
    whose features have two sides (`abstopk`)."""
    indices: Int[Tensor, " code"]
    """Of a row each feature at most once, in no order."""
    starts: Int[Tensor, " boundary"]
    """[row + 1] The first code of each row, and the number of all codes."""
    d_sae: int

    @classmethod
    def from_dense(cls, f: Float[Tensor, "row d_sae"]) -> "SparseCodes":
        """The codes of a dense matrix of them."""
        return cls.where(f != 0, f)

    @classmethod
    def where(cls, fires: Bool[Tensor, "row d_sae"], f: Float[Tensor, "row d_sae"]) -> "SparseCodes":
        """The entries of `f` at which `fires` holds."""
        rows, indices = fires.nonzero(as_tuple=True)
        starts = torch.searchsorted(rows, torch.arange(len(f) + 1, device=f.device))
        return cls(f[rows, indices], indices, starts, f.shape[1])

    @classmethod
    def joined(cls, parts: list["SparseCodes"]) -> "SparseCodes":
        """The codes of several batches, one after another."""
        ends = torch.stack([part.starts[-1] for part in parts]).cumsum(0)
        starts = [part.starts[:-1] + end - part.starts[-1] for part, end in zip(parts, ends, strict=True)]
        return cls(
            torch.cat([part.values for part in parts]),
            torch.cat([part.indices for part in parts]),
            torch.cat([*starts, ends[-1:]]),
            parts[0].d_sae,
        )

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return len(self.starts) - 1

    @property
    def rows(self) -> Int[Tensor, " code"]:
        """The row of each code, rising."""
        return torch.repeat_interleave(self.starts.diff(), output_size=len(self.values))

    @property
    def firings(self) -> Int[Tensor, " {self.d_sae}"]:
        """How many rows each feature fires in, that is has a value other than zero."""
        zeros = torch.zeros(self.d_sae, dtype=torch.long, device=self.values.device)
        return zeros.index_add_(0, self.indices, (self.values != 0).long())

    def firings_in(self, mine: Bool[Tensor, " row"]) -> Int[Tensor, " {self.d_sae}"]:
        """`firings`, of some of the rows alone."""
        zeros = torch.zeros(self.d_sae, dtype=torch.long, device=self.values.device)
        return zeros.index_add_(0, self.indices, ((self.values != 0) & mine[self.rows]).long())

    def of_feature(self, feature: int) -> Float[Tensor, " row"]:
        """One feature's value in each row."""
        chosen = self.values * (self.indices == feature)
        return self.values.new_zeros(self.n_rows).index_add_(0, self.rows, chosen)

    def dense(self) -> Float[Tensor, "row {self.d_sae}"]:
        """The same codes as a dense matrix."""
        empty = self.values.new_zeros(self.n_rows, self.d_sae)
        return empty.index_put_((self.rows, self.indices), self.values)

    def weighted_sum(self, W_dec: Float[Tensor, "{self.d_sae} d_in"]) -> Float[Tensor, "row d_in"]:
        """f @ W_dec."""
        return embedding_bag(
            self.indices, W_dec, self.starts, per_sample_weights=self.values, mode="sum", include_last_offset=True
        )
