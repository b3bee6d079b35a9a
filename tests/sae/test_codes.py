"""Sparse codes are a dense matrix in fewer numbers."""

import torch
from torch import Tensor

from sae_steer.randomness import generator
from sae_steer.sae.codes import SparseCodes


def matrix(rows: int, seed: int = 0) -> Tensor:
    """About a third above zero, one row and one feature silent."""
    f = (torch.randn(rows, 7, generator=generator(seed)) - 0.4).relu()
    f[:, 3] = 0
    f[: rows // 4] = 0
    return f


def test_codes_of_a_dense_matrix_are_that_matrix() -> None:
    f = matrix(20)
    codes = SparseCodes.from_dense(f)
    assert torch.equal(codes.dense(), f)
    assert torch.equal(codes.firings, (f > 0).sum(0))
    assert torch.equal(torch.stack([codes.of_feature(j) for j in range(7)], 1), f)
    assert torch.equal(codes.rows.bincount(minlength=20), (f > 0).sum(1))


def test_a_weighted_sum_is_the_matrix_product() -> None:
    f, W_dec = matrix(20), torch.randn(7, 5, generator=generator(1))
    torch.testing.assert_close(SparseCodes.from_dense(f).weighted_sum(W_dec), f @ W_dec)


def test_joined_codes_are_the_stacked_matrix() -> None:
    parts = [matrix(rows, rows) for rows in (4, 0, 9)]
    joined = SparseCodes.joined([SparseCodes.from_dense(part) for part in parts])
    assert torch.equal(joined.dense(), torch.cat(parts))
