"""The sparse products equal their dense forms in float64, gradients included; the compiled ones equal torch's."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_steer.capability import Capability, assumed, capability
from sae_steer.randomness import generator
from sae_steer.sae.architectures import SLAB
from sae_steer.sae.kernels import cpu as compiled
from sae_steer.sae.kernels import cpu_maddubs as maddubs
from sae_steer.sae.kernels import portable as kernels
from sae_steer.sae.kernels.portable import Part, RowCodes
from sae_steer.world import World

ROWS, D_IN, D_SAE = 50, 12, 24
WORLD = World.local(precision="float32", device="cpu")


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W_enc by rows, b_enc, W_dec, b_dec."""
    shapes = [(ROWS, D_IN), (D_SAE, D_IN), (D_SAE,), (D_SAE, D_IN), (D_IN,)]
    return [torch.randn(shape, dtype=dtype, generator=generator(0, i)) for i, shape in enumerate(shapes)]


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small integers as floats: products are exact, and equal values abound."""
    return torch.randint(-2, 3, shape, generator=generator(seed)).float()


def dense_codes(pre: Tensor, codes: RowCodes) -> Tensor:
    """Pre-activations at the chosen places, zero elsewhere."""
    chosen = torch.zeros(pre.shape, dtype=torch.bool)
    chosen = chosen.scatter(1, codes.indices.long(), True)  # slots past the count are cut by their value below
    used = torch.zeros_like(pre).scatter_add(1, codes.indices.long(), codes.values)
    return pre * (chosen & (used > 0))


@pytest.mark.parametrize("prefixes", [[D_SAE], [3, 10, D_SAE]])
@pytest.mark.parametrize("with_dead", [False, True])
def test_gradients_equal_the_dense_form(prefixes: list[int], with_dead: bool) -> None:
    x, W_enc, b_enc, W_dec, b_dec = leaves()
    bias = b_enc - W_enc @ b_dec
    codes = kernels.select_topk(x, W_enc, bias, 5)
    fit = kernels.reconstruct(x, W_dec, b_dec, codes, prefixes, 2.0)
    parts, dead, weight = [Part(codes, fit)], torch.tensor([1, 4, 5, 9, 20, 23]), 0.7
    error = -fit.errors[-1] / 2.0
    if with_dead:
        revived = kernels.select_topk(x, W_enc[dead], bias[dead], 4)
        aux = kernels.reconstruct(error, W_dec[dead], torch.zeros_like(b_dec), revived, [len(dead)], 2 * weight)
        parts.append(Part(revived, aux, dead))
    found = kernels.feature_gradients(x, b_dec, parts, prefixes, D_SAE)

    params = [tensor.clone().requires_grad_() for tensor in (W_enc, b_enc, W_dec, b_dec)]
    W_enc_, b_enc_, W_dec_, b_dec_ = params
    pre = (x - b_dec_) @ W_enc_.T + b_enc_
    f = dense_codes(pre, codes)
    loss = sum((x - f[:, :end] @ W_dec_[:end] - b_dec_).square().sum() for end in prefixes)
    if with_dead:
        f_dead = dense_codes(pre[:, dead], revived)
        loss = loss + weight * (error - f_dead @ W_dec_[dead]).square().sum()
    expected = torch.autograd.grad(loss, params)
    grad_b_dec = fit.errors[0].sum(0) - found.b_enc @ W_enc
    for mine, reference in zip((found.W_enc, found.b_enc, found.W_dec, grad_b_dec), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)
    if with_dead:
        assert f_dead.abs().sum() > 0, "nothing was revived, so nothing was tested"


@pytest.fixture(params=["vnni", "maddubs"])
def product(request) -> str:
    """A product in int8 that this machine has."""
    if not (capability().int8 if request.param == "vnni" else "avx2" in capability().instructions):
        pytest.skip(f"no {request.param} here")
    return request.param


@pytest.mark.parametrize(
    ("engine", "dtype"), [(kernels, torch.bfloat16), (compiled, torch.bfloat16), (compiled, torch.float32)]
)
@pytest.mark.parametrize("rows", [0, 1, SLAB + 7])
def test_selection_is_exact_where_values_tie_and_however_many_slabs(engine, dtype: torch.dtype, rows: int) -> None:
    x, W, bias = whole_numbers(rows, 4, seed=1), whole_numbers(600, 4, seed=2), whole_numbers(600, seed=3)
    codes = engine.select_topk(x.to(dtype), W.to(dtype), bias.to(dtype), 40)
    pre = x @ W.T + bias
    keys = pre.double() * 1000 - torch.arange(600)  # of equal values the lowest index
    chosen = torch.zeros(pre.shape, dtype=torch.bool).scatter(1, keys.topk(40, dim=1).indices, True)
    assert torch.equal(dense_codes(pre, codes), pre.relu() * chosen)


@pytest.mark.parametrize(("rows", "d_sae", "k"), [(1, 24, 24), (300, 24, 5), (300, 600, 40), (130, 4096, 40)])
def test_selection_in_float32_is_torchs(rows: int, d_sae: int, k: int) -> None:
    x, W, bias = (
        torch.randn(shape, generator=generator(5, i)) for i, shape in enumerate([(rows, 8), (d_sae, 8), d_sae])
    )
    x[0, 0] = 1e30  # from the smallest exponents to the largest
    x[-1] *= 1e-30
    codes, pre = compiled.select_topk(x, W, bias, k), torch.addmm(bias, x, W.T)
    top = pre.topk(k, dim=1)
    expected = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(dense_codes(pre, codes), expected)
    assert torch.equal(codes.counts, (top.values > 0).sum(1).int())


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"avx2", "avx512", "avx512_vnni"}, "vnni"),
        ({"avx2", "avx_vnni"}, "maddubs"),
        ({"avx2", "avx512"}, "maddubs"),
        ({"avx2"}, "maddubs"),
        ({"neon", "arm_i8mm"}, None),
        (set(), None),
    ],
)
def test_the_product_in_int8_is_one_this_processor_makes_exactly(instructions: set[str], expected: str | None) -> None:
    with assumed(Capability(frozenset(instructions))):
        assert compiled.int8_product() == expected
        assert compiled.screening_pays(4096, 40) == (expected is not None)


@pytest.mark.parametrize(("rows", "d_in", "d_sae"), [(1, 8, 32), (5, 13, 37), (64, 512, 96)])
def test_a_product_of_seven_bits_is_exact_at_its_largest(rows: int, d_in: int, d_sae: int) -> None:
    if "avx2" not in capability().instructions:
        pytest.skip("no AVX2 here")
    ends = np.array([-maddubs.LEVELS, maddubs.LEVELS], np.int8)
    x, W = (ends[torch.randint(2, (n, d_in), generator=generator(n)).numpy()] for n in (rows, d_sae))
    x[0], W[0], W[-1] = maddubs.LEVELS, maddubs.LEVELS, -maddubs.LEVELS  # as far as a sum can go, either way
    panels = maddubs.Panels.empty(d_sae, d_in)
    signless, products = maddubs.room(rows, d_in, d_sae)
    maddubs.pack(0, len(panels.weights), W, panels.weights, panels.begin)
    signless[:rows, :d_in] = x + np.int8(maddubs.ZERO)
    maddubs.multiply(signless, panels.weights, panels.begin, products)
    assert np.array_equal(products[:rows, :d_sae], x.astype(np.int64) @ W.T.astype(np.int64))


@pytest.mark.parametrize("rows", [0, 1, 1000])
@pytest.mark.parametrize(("d_sae", "k"), [(24, 5), (600, 40), (4096, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_screened_in_int8_are_those_of_float32(
    d_sae: int, k: int, rows: int, dtype: torch.dtype, product: str
) -> None:
    x, W = (torch.randn(n, 64, generator=generator(n)) for n in (rows, d_sae))
    b_enc, b_dec = torch.randn(d_sae, generator=generator(1)), torch.randn(64, generator=generator(2))
    x[: rows // 10, 3] = 1000  # takes all of int8's range, and no feature reads it
    W[:, 3] = 0
    low, coarse = W.to(dtype), compiled.Coarse.of(W, product)
    codes, unsure = compiled.screened_topk(x, low, coarse, b_enc, b_dec, k)
    pre, whole = torch.addmm(b_enc, x - b_dec, low.float().T), kernels.select_topk(x - b_dec, low.float(), b_enc, k)
    torch.testing.assert_close(dense_codes(pre, codes), dense_codes(pre, whole), rtol=1e-5, atol=1e-4)
    if d_sae == 4096:
        assert unsure == rows // 10, "int8 decides all rows but those it was made hard for"


@pytest.mark.parametrize("engine", [kernels, compiled])
def test_codes_above_their_floors_are_all_of_them(engine) -> None:
    x, W, bias = (tensor.float() for tensor in (leaves()[0], leaves()[1], leaves()[2]))
    floor = 2 * torch.randn(D_SAE, generator=generator(4))
    codes = (
        engine.select_above(x, W, bias, floor) if engine is kernels else engine.select_above(x, W, bias, floor, width=2)
    )
    pre = torch.addmm(bias, x, W.T)
    expected = pre * (pre > floor.clamp_min(0))
    got = torch.zeros_like(pre).scatter_add(1, codes.indices.long(), codes.values)
    torch.testing.assert_close(got, expected)
    least = kernels.nth_largest(codes.values, 30, WORLD)
    assert float(least) == float(expected.flatten().topk(30).values[-1])
    kept = engine.at_least(codes, least)
    assert int((kept.values > 0).sum()) == 30
    assert float(kernels.nth_largest(codes.values, 10**6, WORLD)) == 0


@pytest.mark.parametrize("prefixes", [[D_SAE], [3, 10, D_SAE]])
def test_compiled_products_equal_torchs(prefixes: list[int]) -> None:
    x, W_enc, b_enc, W_dec, b_dec = leaves(torch.float32)
    W_dec, bias, dead = normalize(W_dec, dim=1), b_enc - W_enc @ b_dec, torch.tensor([1, 4, 5, 9, 20, 23])
    results = []
    for engine in (kernels, compiled):
        codes = kernels.select_topk(x, W_enc, bias, 5)
        fit = engine.reconstruct(x, W_dec, b_dec, codes, prefixes, 0.01)
        revived = kernels.select_topk(x, W_enc[dead], bias[dead], 4)
        aux = engine.reconstruct(x, W_dec[dead], torch.zeros_like(b_dec), revived, [len(dead)], 0.02)
        results.append((fit, [Part(codes, fit), Part(revived, aux, dead)]))
    for name in ("errors", "slopes", "squared_errors"):
        torch.testing.assert_close(getattr(results[1][0], name), getattr(results[0][0], name), rtol=1e-4, atol=1e-5)

    found = kernels.feature_gradients(x, b_dec, results[0][1], prefixes, D_SAE)
    weights = (W_enc.clone(), W_dec.clone(), torch.empty(D_SAE, D_IN, dtype=torch.bfloat16))
    moments = tuple(torch.zeros(D_SAE, D_IN) for _ in range(4))
    coarse = compiled.Coarse.of(W_enc, "vnni")
    b, fired, through = compiled.step_features(
        x, b_dec, results[1][1], prefixes, weights, coarse, moments, (0.01, 1e-9, 1.0)
    )
    torch.testing.assert_close(b, found.b_enc, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(through, found.b_enc @ W_enc, rtol=1e-4, atol=1e-5)
    assert torch.equal(fired.float(), found.fired)
    across = found.W_dec - (found.W_dec * W_dec).sum(1, keepdim=True) * W_dec
    torch.testing.assert_close(moments[0], 0.1 * found.W_enc, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments[2], 0.1 * across, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights[1].norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(weights[2], weights[0].bfloat16())
    torch.testing.assert_close(coarse.rows * coarse.scales[:, None], weights[0], rtol=0, atol=0.02)
    step = 0.01 * moments[0] / (moments[1].sqrt() + 1e-9)
    torch.testing.assert_close(weights[0], W_enc - step)


@pytest.mark.parametrize("kind", ["vnni", "maddubs"])
def test_a_step_and_a_fresh_start_round_the_weights_alike(kind: str) -> None:
    d_in, d_sae = 512, 1024
    x, W = torch.randn(64, d_in, generator=generator(1)), torch.randn(d_sae, d_in, generator=generator(2))
    codes = kernels.select_topk(x, W, torch.zeros(d_sae), 5)
    fit = compiled.reconstruct(x, normalize(W, dim=1), torch.zeros(d_in), codes, [d_sae], 0.01)
    weights, coarse = (W.clone(), normalize(W, dim=1), W.bfloat16()), compiled.Coarse.of(W, kind)
    moments = tuple(torch.zeros(d_sae, d_in) for _ in range(4))
    compiled.step_features(
        x, torch.zeros(d_in), [Part(codes, fit)], [d_sae], weights, coarse, moments, (0.01, 1e-9, 1.0)
    )
    again = compiled.Coarse.of(weights[0], kind)
    assert torch.equal(coarse.rows, again.rows)
    assert torch.equal(coarse.scales, again.scales)


def test_a_feature_rounded_more_coarsely_than_others_is_not_overlooked(product: str) -> None:
    x, W = (torch.randn(n, 64, generator=generator(n)) for n in (500, 4096))
    x[:, 3], W[::50, 3] = 0.01 * x[:, 3], 300  # a weight that takes int8's range and that the rows hardly use
    low, zero = W.bfloat16(), torch.zeros(4096)
    codes, _ = compiled.screened_topk(x, low, compiled.Coarse.of(W, product), zero, torch.zeros(64), 40)
    pre, whole = x @ low.float().T, kernels.select_topk(x, low.float(), zero, 40)
    torch.testing.assert_close(dense_codes(pre, codes), dense_codes(pre, whole), rtol=1e-4, atol=1e-3)
