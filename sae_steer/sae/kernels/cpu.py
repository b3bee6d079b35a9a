"""The kernels of `kernels` for CPUs, compiled by numba: same results, up to the order of a sum.

`select_topk` is exact and reads each pre-activation once: the maxima of groups of entries give a bound that at
least k entries reach; the few entries above it are then cut to k. All comparisons are of integers, the bits of the
numbers. `screened_topk` halves or quarters the encoder's product: in int8 it finds the entries that may be among the
k largest, and computes these alone in float32. `step_features` sums a feature's gradients and updates it before
it leaves the cache, so no gradient of a matrix is ever stored.

Loops run over ranges of rows or features without the interpreter's lock, each range in one thread; each row and
feature has one owner, so results do not depend on the number of threads.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from sae_steer.capability import capability
from sae_steer.sae.architectures import SLAB
from sae_steer.sae.kernels import cpu_maddubs as maddubs
from sae_steer.sae.kernels import cpu_select as choosing
from sae_steer.sae.kernels import cpu_step as loops
from sae_steer.sae.kernels.portable import Part, Reconstruction, RowCodes, preactivations
from sae_steer.world import in_threads

AT_ONCE = 256
"""Rows whose pre-activations a thread makes and reads: at 4,096 features they stay in its cache meanwhile."""
SCREENED_AT_ONCE = 128
"""The same where they are int32."""
SPREAD = 6.0
"""How many times its root mean square the error of int8 in an entry may be: beyond 6, two normal ones in 10^9."""
BLOCK = 64
"""Features whose parts of the gradient of b_dec are summed together."""


def _each(loop, count: int, *arguments) -> None:
    """Run loop(start, stop, *arguments) over all of `count`, four ranges a thread of torch's: one may be held up."""
    ranges = max(min(4 * torch.get_num_threads(), count), 1)
    cuts = [count * part // ranges for part in range(ranges + 1)]
    in_threads(lambda part: loop(*cuts[part : part + 2], *arguments), range(ranges), torch.device("cpu"))


def _empty_codes(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(rows, width, dtype=torch.int32),
        torch.zeros(rows, width),
        torch.zeros(rows, dtype=torch.int32),
    )


@torch.no_grad()
def select_topk(
    x: Float[Tensor, "row d_in"], W: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"], k: int
) -> RowCodes:
    """As in `kernels`; of float32 too the lowest indices among equal ones."""
    indices, values, counts = _empty_codes(len(x), k)
    bits = torch.int16 if x.dtype == torch.bfloat16 else torch.int32

    @torch.no_grad()  # holds for one thread
    def choose(start: int) -> None:
        here = slice(start, start + AT_ONCE)
        pre = preactivations(x[here], W, bias)
        out = (indices[here].numpy(), values[here].numpy(), counts[here].numpy())
        choosing.select_topk(0, len(pre), pre.view(bits).numpy(), k, *out)

    in_threads(choose, range(0, len(x), AT_ONCE), x.device)
    return RowCodes(indices, values, counts)


Int8Product = Literal["vnni", "maddubs"]
_LEVELS: dict[Int8Product, int] = {"vnni": 127, "maddubs": maddubs.LEVELS}


def int8_product() -> Int8Product | None:
    """How this processor multiplies int8 exactly and faster than anything else, if it does.

    `vnni`, one instruction for four products, is oneDNN's; `maddubs`, with AVX2, is our own. With AVX2-VNNI oneDNN's
    is exact too, at 107 Gop/s a core against 275. What ARM's i8mm would give has not been measured.
    """
    here = capability()
    if "avx2" not in here.instructions:
        return None
    return "vnni" if here.int8 and "avx512" in here.instructions else "maddubs"


@dataclass(frozen=True)
class Coarse:
    """Rows in int8, each times a scale of its own, for one of the products."""

    rows: Int8[Tensor, "row d_in"]
    scales: Float[Tensor, " row"]
    product: Int8Product

    @classmethod
    def of(cls, rows: Float[Tensor, "row d_in"], product: Int8Product) -> "Coarse":
        """`rows`, rounded to nearest."""
        coarse = cls(torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows)), product)
        centred = torch.empty_like(rows).numpy()
        out = (centred, coarse.rows.numpy(), coarse.scales.numpy())
        _each(loops.round_to_int8, len(rows), rows.numpy(), np.zeros(rows.shape[1], np.float32), *coarse.grid, *out)
        return coarse

    @property
    def grid(self) -> tuple[np.float32, np.float32]:
        """The largest whole number, and one over it."""
        levels = _LEVELS[self.product]
        return np.float32(levels), np.float32(1 / levels)

    def panels(self) -> maddubs.Panels | None:
        """The rows as `maddubs` reads them, where that is the product."""
        if self.product == "vnni":
            return None
        panels = maddubs.Panels.empty(*self.rows.shape)
        _each(maddubs.pack, len(panels.weights), self.rows.numpy(), panels.weights, panels.begin)
        return panels


def screening_pays(d_sae: int, k: int) -> bool:
    """Whether `screened_topk` is faster here, and k enough to tell an error from: more than k entries are computed
    twice, to halve the work on d_sae."""
    return int8_product() is not None and k >= 16 and d_sae >= 40 * k


@torch.no_grad()
def screened_topk(
    x: Float[Tensor, "row d_in"],
    W: Float[Tensor, "d_sae d_in"],
    coarse: Coarse,
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
) -> tuple[RowCodes, int]:
    """`select_topk` of float32 rows at about the cost of int8; and how many rows int8 could not decide.

    Of the product of x - b_dec and W in int8, all entries of a row that can be among its k largest are computed in
    float32; how many these are depends on the error of int8 in this row, which is measured. A row where they are more
    than 4k + 64 is left to `select_topk` in float32.

    Args:
        x: float32.
        W: float32 or bfloat16.
        coarse: W in int8.
    """
    indices, values, counts = _empty_codes(len(x), k)
    most = min(4 * k + 64, len(W))
    weights = W.numpy() if W.dtype == torch.float32 else W.view(torch.int16).numpy()
    panels = coarse.panels()

    @torch.no_grad()  # holds for one thread
    def choose(start: int) -> None:
        here = slice(start, start + SCREENED_AT_ONCE)
        centred, scales, products = _int8_products(x[here], b_dec, coarse, panels)
        choosing.screened_topk(
            0, len(centred), centred, weights, b_enc.numpy(), products, scales, coarse.scales.numpy(), k,
            np.float32(SPREAD), most, indices[here].numpy(), values[here].numpy(), counts[here].numpy(),
        )  # fmt: skip

    in_threads(choose, range(0, len(x), SCREENED_AT_ONCE), x.device)
    unsure = (counts < 0).nonzero()[:, 0]
    if len(unsure):
        whole = select_topk(x[unsure] - b_dec, W.float(), b_enc, k)
        indices[unsure], values[unsure], counts[unsure] = whole.indices, whole.values, whole.counts
    return RowCodes(indices, values, counts), len(unsure)


def _int8_products(
    x: Tensor, b_dec: Tensor, coarse: Coarse, panels: maddubs.Panels | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x - b_dec, its scales in int8, and its whole-numbered products with the coarse rows."""
    centred, scales = np.empty(x.shape, np.float32), np.empty(len(x), np.float32)
    if panels is None:
        rounded = np.empty(x.shape, np.int8)
        loops.round_to_int8(0, len(x), x.numpy(), b_dec.numpy(), *coarse.grid, centred, rounded, scales)
        return centred, scales, torch._int_mm(torch.from_numpy(rounded), coarse.rows.T).numpy()
    rows, products = maddubs.room(*x.shape, len(coarse.rows))
    rounded = rows.view(np.int8)[: len(x), : x.shape[1]]
    loops.round_to_int8(0, len(x), x.numpy(), b_dec.numpy(), *coarse.grid, centred, rounded, scales)
    rounded += maddubs.ZERO
    maddubs.multiply(rows, panels.weights, panels.begin, products)
    return centred, scales, products


@torch.no_grad()
def select_above(
    x: Float[Tensor, "row d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    floor: Float[Tensor, " d_sae"],
    width: int = 128,
) -> RowCodes:
    """As in `kernels`; `width` slots a row to begin with."""
    floor = floor.float().clamp_min(0).numpy()
    indices, values, counts = _empty_codes(len(x), width)
    for start in range(0, len(x), SLAB):
        slab = x[start : start + SLAB]
        pre, here = preactivations(slab, W, bias).float().numpy(), slice(start, start + len(slab))
        _each(
            choosing.select_above,
            len(slab),
            pre,
            floor,
            indices[here].numpy(),
            values[here].numpy(),
            counts[here].numpy(),
        )
        most = int(counts[here].max()) if len(slab) else 0
        if most > indices.shape[1]:
            indices, values = (_widened(old, most + most // 4) for old in (indices, values))
            out = (indices[here].numpy(), values[here].numpy(), counts[here].numpy())
            _each(choosing.select_above, len(slab), pre, floor, *out)
    return RowCodes(indices, values, counts)


def _widened(old: Tensor, width: int) -> Tensor:
    wide = old.new_zeros(len(old), width)
    wide[:, : old.shape[1]] = old
    return wide


def at_least(codes: RowCodes, least: Float[Tensor, ""]) -> RowCodes:
    """As in `kernels`; the codes kept move to the front of their rows, in place."""
    arrays = (codes.indices.numpy(), codes.values.numpy(), codes.counts.numpy())
    _each(choosing.keep_at_least, len(codes.counts), np.float32(least.item()), *arrays)
    return codes


@torch.no_grad()
def reconstruct(
    x: Float[Tensor, "row d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    codes: RowCodes,
    prefixes: list[int],
    scale: Float[Tensor, ""] | float,
) -> Reconstruction:
    """As in `kernels`."""
    errors = torch.empty(len(prefixes), *x.shape)
    squares = torch.empty(len(prefixes), len(x))
    slopes = torch.zeros_like(codes.values)
    _each(
        loops.reconstruct, len(x), x.numpy(), W_dec.numpy(), b_dec.numpy(), codes.indices.numpy(),
        codes.values.numpy(), codes.counts.numpy(), np.array(prefixes, np.int32), np.float32(scale),
        errors.numpy(), slopes.numpy(), squares.numpy(),
    )  # fmt: skip
    return Reconstruction(errors, slopes, squares.sum(1))


def _slots_by_feature(part: Part | None, d_sae: int) -> tuple:
    """Where each feature's codes begin, the codes in features' order, their values, slopes, errors, slots a row."""
    if part is None:
        nothing = np.zeros(1, np.float32)
        empty = np.zeros(d_sae + 1, np.int32), np.zeros(1, np.int32)
        return *empty, nothing, nothing, nothing[None, None], 1
    indices, counts = part.codes.indices, part.codes.counts
    if part.features is not None:
        indices = part.features.int()[indices.long()]
    starts, order = np.zeros(d_sae + 1, np.int32), np.empty(indices.numel(), np.int32)
    loops.sort_by_feature(indices.numpy(), counts.numpy(), starts, order)
    values, slopes = part.codes.values.flatten().numpy(), part.fit.slopes.flatten().numpy()
    return starts, order, values, slopes, part.fit.errors.numpy(), indices.shape[1]


@torch.no_grad()
def step_features(
    x: Float[Tensor, "row d_in"],
    b_dec: Float[Tensor, " d_in"],
    parts: list[Part],
    prefixes: list[int],
    weights: tuple[Tensor, Tensor, Tensor],
    coarse: Coarse | None,
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    rates: tuple[float, float, float],
) -> tuple[Float[Tensor, " d_sae"], Int[Tensor, " d_sae"], Float[Tensor, " d_in"]]:
    """Adam on every feature's encoder and decoder row in place, the decoder's back to norm one.

    Args:
        weights: W_enc by rows, W_dec, and the bfloat16 copy of W_enc (empty where there is none).
        coarse: the int8 copy of W_enc, where there is one.
        moments: Adam's first and second of W_enc, and of W_dec.
        rates: the step's length, epsilon and the correction of the second moment.

    Returns the gradient to b_enc, which features fired, and the sum of b_enc's gradient times W_enc.
    """
    W_enc, W_dec, low = weights
    d_sae, blocks = len(W_enc), -(-len(W_enc) // BLOCK)
    b_enc, fired, through = torch.empty(d_sae), torch.empty(d_sae, dtype=torch.int32), torch.zeros(blocks, x.shape[1])
    dead = parts[1] if len(parts) > 1 else None
    coarse = coarse or Coarse(torch.empty(0, W_enc.shape[1], dtype=torch.int8), torch.empty(0), "vnni")
    _each(
        loops.step_features, blocks, BLOCK, x.numpy(), b_dec.numpy(), np.array(prefixes, np.int32),
        *_slots_by_feature(parts[0], d_sae), *_slots_by_feature(dead, d_sae),
        W_enc.numpy(), W_dec.numpy(), low.view(torch.int16).numpy(), coarse.rows.numpy(), coarse.scales.numpy(),
        *(moment.numpy() for moment in moments),
        *coarse.grid, *map(np.float32, rates), b_enc.numpy(), fired.numpy(), through.numpy(),
    )  # fmt: skip
    return b_enc, fired, through.sum(0)
