"""The sparse products equal their dense forms, gradients included, and repeat to the byte."""

import pytest
import torch
from torch import Tensor

from sae_steer.runtime import World, generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.sae.kernels import SLAB, Support, decode_codes, encode_topk, select_topk, selected_dots
from sae_steer.sae.losses import auxk_loss, reconstruction_mse
from sae_steer.sae.training import reconstruct_with

ROWS, D_IN, D_SAE = 50, 12, 24


@pytest.fixture
def leaves() -> list[Tensor]:
    """x, W_enc, b_enc, W_dec, b_dec in float64."""
    shapes = [(ROWS, D_IN), (D_IN, D_SAE), (D_SAE,), (D_SAE, D_IN), (D_IN,)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator(0, i)).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def dense_codes(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> Tensor:
    top = ((x - b_dec) @ W_enc + b_enc).topk(k, dim=1)
    return torch.zeros(len(x), W_enc.shape[1], dtype=x.dtype).scatter(1, top.indices, top.values.relu())


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small integers as floats: products are exact, and equal values abound."""
    return torch.randint(-2, 3, shape, generator=generator(seed)).float()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_gradients_equal_the_dense_form(leaves: list[Tensor], k: int) -> None:
    x, W_enc, b_enc, W_dec, b_dec = leaves
    sparse = decode_codes(encode_topk(x, W_enc, b_enc, b_dec, k), W_dec) + b_dec
    dense = dense_codes(x, W_enc, b_enc, b_dec, k) @ W_dec + b_dec
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(reconstruction_mse(x, sparse), leaves)
    theirs = torch.autograd.grad(reconstruction_mse(x, dense), leaves)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_dead_features_loss_has_the_dense_gradient_and_reaches_the_encoder(leaves: list[Tensor]) -> None:
    x = leaves[0].detach()
    sae = TopKSAE(TopKConfig(d_in=D_IN, d_sae=D_SAE, k=3, dtype="float64"))
    for name, leaf in zip(("W_enc", "b_enc", "W_dec", "b_dec"), leaves[1:], strict=True):
        getattr(sae, name).data.copy_(leaf.detach())
    dead = torch.tensor([1, 4, 5, 9, 20, 23])
    error = x - sae(x)
    world = World.local(precision="float32", device="cpu")
    auxk_loss(error, reconstruct_with(sae, dead, x, 4, world)).backward()

    W_enc, b_enc, W_dec, b_dec = leaves[1:]
    f = dense_codes(x, W_enc[:, dead], b_enc[dead], b_dec, 4)
    auxk_loss(error, f @ W_dec[dead]).backward()
    for name, reference in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
        torch.testing.assert_close(getattr(sae, name).grad, reference.grad, rtol=1e-12, atol=1e-12)
    assert sae.W_enc.grad[:, dead].abs().sum() > 0
    alive = [j for j in range(D_SAE) if j not in dead]
    assert torch.equal(sae.W_enc.grad[:, alive], torch.zeros(D_IN, len(alive), dtype=torch.float64))


@pytest.mark.parametrize("rows", [0, 1, SLAB, 2 * SLAB + 7])
def test_selection_is_exact_where_values_tie_and_however_many_slabs(rows: int) -> None:
    x, W_enc, b_enc = whole_numbers(rows, 4, seed=1), whole_numbers(4, 30, seed=2), whole_numbers(30, seed=3)
    values, support = select_topk(x, W_enc, b_enc, 7)
    preactivations = x @ W_enc + b_enc
    assert torch.equal(values.sort(1).values, preactivations.topk(7, dim=1).values.sort(1).values)
    assert torch.equal(values, preactivations.gather(1, support.indices))
    in_order = support.indices.sort(1).values
    assert bool((in_order[:, 1:] > in_order[:, :-1]).all()), "a feature was selected twice"


def test_sums_by_feature_equal_a_dense_product() -> None:
    indices = torch.randint(D_SAE, (ROWS, 4), generator=generator(5))
    weights, rows = whole_numbers(ROWS, 4, seed=6), whole_numbers(ROWS, D_IN, seed=7)
    dense = torch.zeros(ROWS, D_SAE).scatter_add(1, indices, weights)
    support = Support(indices, D_SAE)
    assert torch.equal(support.sum_rows(rows, weights), dense.T @ rows)
    assert torch.equal(support.sum_weights(weights), dense.sum(0))


def test_selected_dots_are_the_dots() -> None:
    indices = torch.randint(D_SAE, (ROWS, 4), generator=generator(5))
    rows, table = whole_numbers(ROWS, D_IN, seed=6), whole_numbers(D_SAE, D_IN, seed=7)
    assert torch.equal(selected_dots(rows, table, indices), (rows @ table.T).gather(1, indices))


def test_firings_count_values_above_zero(random_sae: TopKSAE) -> None:
    codes = random_sae.encode(torch.randn(200, 16, generator=generator(1)))
    assert torch.equal(codes.firings, (codes.dense() > 0).sum(0))


def test_the_same_batch_gives_the_same_bytes() -> None:
    x = torch.randn(600, 32, generator=generator(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(3):
            sae = TopKSAE(TopKConfig(d_in=32, d_sae=256, k=8))
            for number, weight in enumerate(sae.parameters()):
                weight.data.normal_(generator=generator(2, number))
            with torch.autocast("cpu", torch.bfloat16):
                codes = encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, 8)
            reconstruction_mse(x, decode_codes(codes, sae.W_dec) + sae.b_dec).backward()
            runs.append([weight.grad for weight in sae.parameters()])
    finally:
        torch.set_num_threads(threads)
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))
