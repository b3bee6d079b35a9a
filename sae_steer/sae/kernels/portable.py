"""The products of a training step on sparse codes, in torch: no rows x d_sae tensor beyond the encoder's output.

1. `select_topk`, `select_above`: the encoder's product for a slab of rows, and the codes of each row.
2. `reconstruct`: x_hat[n] = sum_i values[n, i] W_dec[indices[n, i]] + b_dec, an `embedding_bag` over the
   dictionary; from its error the slope of the loss along each code.
3. `feature_gradients`: sort the codes by feature; the gradient of feature j is then a weighted sum over the
   rows that use it, an `embedding_bag` over the batch. The sort is stable and each sum has one owner, so the
   same inputs give the same bytes.

`compiled` has the same functions for CPUs, several times faster; this file is what they must equal.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae_steer.sae.architectures import SLAB
from sae_steer.world import World


@dataclass(frozen=True)
class RowCodes:
    """Codes in a rectangle: row n has values[n, i] at feature indices[n, i] for i < counts[n], and nothing after."""

    indices: Int[Tensor, "row slot"]
    values: Float[Tensor, "row slot"]
    """Zero past the row's count."""
    counts: Int[Tensor, " row"]

    def with_values(self, values: Float[Tensor, "row slot"]) -> "RowCodes":
        """The same features at other values."""
        return RowCodes(self.indices, values, self.counts)


@dataclass(frozen=True)
class Reconstruction:
    """What the codes make of the rows, by its derivatives."""

    errors: Float[Tensor, "prefix row d_in"]
    """The gradient of the loss to the contribution of a feature in each prefix's last part; [0] is that to b_dec."""
    slopes: Float[Tensor, "row slot"]
    """The gradient of the loss to each code."""
    squared_errors: Float[Tensor, " prefix"]
    """Sum over rows of ||x - x_hat||^2, for each prefix."""


@dataclass(frozen=True)
class Part:
    """Codes of a batch and what the loss says of them, ready to become gradients of the features."""

    codes: RowCodes
    fit: Reconstruction
    features: Int[Tensor, " chosen"] | None = None
    """The feature behind each index, where the codes are of some features only."""


def preactivations(
    x: Float[Tensor, "row d_in"], W: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"]
) -> Float[Tensor, "row d_sae"]:
    """x @ W.T + bias, at the type of its operands."""
    return torch.addmm(bias, x, W.T)


@torch.no_grad()
def select_topk(
    x: Float[Tensor, "row d_in"], W: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"], k: int
) -> RowCodes:
    """The k largest pre-activations of each row; among equal ones the lowest indices; those not above zero are none."""
    parts = [_largest(preactivations(slab, W, bias), k) for slab in x.split(SLAB)]
    values = torch.cat([values for values, _ in parts]).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    indices = torch.cat([indices for _, indices in parts])
    return RowCodes(indices.int(), values.relu(), torch.full((len(x),), k, dtype=torch.int32, device=x.device))


def _largest(pre: Float[Tensor, "row d_sae"], k: int) -> tuple[Tensor, Tensor]:
    d_sae = pre.shape[1]
    if pre.dtype != torch.bfloat16 or d_sae > 1 << 16:  # equal values are rare in float32
        return pre.topk(k, dim=1, sorted=False)
    bits = pre.view(torch.int16)  # flipped below zero they order as the numbers do; the index settles ties
    keys = (bits ^ ((bits >> 15) & 0x7FFF)).int() * (1 << 16) + torch.arange(d_sae - 1, -1, -1, device=pre.device).int()
    indices = d_sae - 1 - (keys.topk(k, dim=1, sorted=False).values & 0xFFFF)
    return pre.gather(1, indices.long()), indices


@torch.no_grad()
def select_above(
    x: Float[Tensor, "row d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    floor: Float[Tensor, " d_sae"],
) -> RowCodes:
    """Every pre-activation above zero and above its feature's floor, in the features' order; waits for the device."""
    slabs = []
    for slab in x.split(SLAB):
        pre = preactivations(slab, W, bias)
        pre = pre if pre.dtype == torch.float64 else pre.float()
        rows, indices = (pre > floor.clamp_min(0)).nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(slab))
        slot = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[rows]
        slabs.append((pre[rows, indices], indices, rows, slot, counts))
    width = max(1, max(int(counts.max()) if len(counts) else 0 for *_, counts in slabs))
    return _rectangle(slabs, width)


def _rectangle(slabs: list, width: int) -> RowCodes:
    """The slabs' lists of codes, each row's from slot 0 on."""
    all_indices, all_values = [], []
    for values, indices, rows, slot, counts in slabs:
        all_indices.append(indices.new_zeros(len(counts), width).index_put_((rows, slot), indices).int())
        all_values.append(values.new_zeros(len(counts), width).index_put_((rows, slot), values))
    return RowCodes(torch.cat(all_indices), torch.cat(all_values), torch.cat([slab[4] for slab in slabs]).int())


def at_least(codes: RowCodes, least: Float[Tensor, ""]) -> RowCodes:
    """The codes of value `least` or more."""
    return codes.with_values(codes.values * (codes.values >= least))


def nth_largest(values: Float[Tensor, "..."], n: int, world: World) -> Float[Tensor, ""]:
    """The n-th largest of the values above zero of all processes, or zero if there are fewer.

    Exact in float32 and without sorting: a histogram of the upper 16 bits, then one of the lower 16 bits.
    """
    bits = values.flatten().float().view(torch.int32).long()
    upper, remaining = _bin_of_nth(bits >> 16, torch.ones_like(bits), 1 << 15, n, world)
    lower, _ = _bin_of_nth(bits & 0xFFFF, (bits >> 16 == upper).long(), 1 << 16, remaining, world)
    return ((upper << 16) + lower).int().view(torch.float32)


def _bin_of_nth(bins: Tensor, weights: Tensor, size: int, n: Tensor | int, world: World) -> tuple[Tensor, Tensor]:
    """The highest bin with n or more at it and above, or bin 0; and how many of the n are left for it."""
    counts = torch.zeros(size, dtype=torch.long, device=bins.device).index_add_(0, bins, weights)
    reached = world.sum_(counts).flip(0).cumsum(0).flip(0)  # [b] how many lie in bin b or above
    found = ((reached >= n).sum() - 1).clamp_min(0)
    return found, n - (reached[found] - counts[found])


@torch.no_grad()
def reconstruct(
    x: Float[Tensor, "row d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    codes: RowCodes,
    prefixes: list[int],
    scale: Float[Tensor, ""] | float,
) -> Reconstruction:
    """Errors of the reconstructions by the first prefixes[0], prefixes[1], ... features, the last being all.

    The loss is scale / 2 times the sum of ||x - x_hat||^2 over rows and prefixes.
    """
    group = _group(codes.indices, prefixes)
    indices, errors, squares = codes.indices.long(), [], []
    for number in range(len(prefixes)):
        weights = codes.values * (group <= number) if len(prefixes) > 1 else codes.values
        errors.append(embedding_bag(indices, W_dec, per_sample_weights=weights, mode="sum") + b_dec - x)
        squares.append(errors[-1].square().sum())
    stacked = torch.stack(errors) * scale
    stacked = stacked.flip(0).cumsum(0).flip(0)  # a feature takes part in its own prefix and all longer ones
    slopes = torch.zeros_like(codes.values)
    for number in range(len(prefixes)):
        slopes += selected_dots(stacked[number], W_dec, indices) * (group == number)
    return Reconstruction(stacked, slopes * (codes.values > 0), torch.stack(squares))


def _group(indices: Int[Tensor, "..."], prefixes: list[int]) -> Int[Tensor, "..."]:
    """The number of the first prefix that holds each feature."""
    if len(prefixes) == 1:
        return torch.zeros_like(indices)
    return torch.bucketize(indices, torch.tensor(prefixes, device=indices.device), right=True)


def selected_dots(
    rows: Float[Tensor, "row d"], table: Float[Tensor, "d_sae d"], indices: Int[Tensor, "row slot"]
) -> Float[Tensor, "row slot"]:
    """out[n, i] = rows[n] . table[indices[n, i]]."""
    count, k = indices.shape
    bags = torch.arange(count, device=rows.device)
    # autograd's own for embedding_bag's weights: 2.4 ms, against 42 for an einsum over table[indices]
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(), table, indices.flatten(), bags * k, bags.repeat_interleave(k), 0
    )
    return dots.view(count, k)


@dataclass(frozen=True)
class FeatureGradients:
    """Gradients of the loss to what belongs to one feature each, summed over the rows."""

    W_enc: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    fired: Float[Tensor, " d_sae"]
    """Rows in which each feature is above zero."""


@torch.no_grad()
def feature_gradients(
    x: Float[Tensor, "row d_in"], b_dec: Float[Tensor, " d_in"], parts: list[Part], prefixes: list[int], d_sae: int
) -> FeatureGradients:
    """The gradients of all features' weights, the encoder's given as rows of its transpose."""
    W_enc, W_dec = x.new_zeros(d_sae, x.shape[1]), x.new_zeros(d_sae, x.shape[1])
    b_enc, fired = x.new_zeros(d_sae), x.new_zeros(d_sae)
    for part in parts:
        codes, fit = part.codes, part.fit
        indices = codes.indices if part.features is None else part.features[codes.indices.long()]
        in_order, slots, bounds = _by_feature(indices, d_sae)
        starts = bounds[:-1]
        owners = slots // codes.indices.shape[1]
        slopes, values = fit.slopes.flatten()[slots], codes.values.flatten()[slots]
        W_enc += embedding_bag(owners, x, starts, per_sample_weights=slopes, mode="sum")
        if len(fit.errors) > 1:
            owners = owners + len(x) * _group(in_order, prefixes)
        W_dec += embedding_bag(owners, fit.errors.flatten(0, 1), starts, per_sample_weights=values, mode="sum")
        b_enc += _segment_sums(slopes, bounds)
        if part.features is None:
            fired += _segment_sums((values > 0).to(x), bounds)
    return FeatureGradients(W_enc - b_enc[:, None] * b_dec, W_dec, b_enc, fired)


def sums_by_feature(
    indices: Int[Tensor, "row slot"], values: Float[Tensor, "row slot"], d_sae: int
) -> Float[Tensor, " d_sae"]:
    """The sum of each feature's values; the same bytes every time, which `index_add_` on a GPU does not promise."""
    _, slots, bounds = _by_feature(indices, d_sae)
    return _segment_sums(values.flatten()[slots], bounds)


def _by_feature(indices: Int[Tensor, "row slot"], d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The slots' features in order, the slots in that order, and where each feature's begin and end, [d_sae + 1]."""
    in_order, slots = torch.sort(indices.flatten().int(), stable=True)  # int32: 1.9 ms; int64: 3.1
    edges = torch.arange(d_sae + 1, device=indices.device, dtype=torch.int32)
    return in_order, slots, torch.searchsorted(in_order, edges)


def _segment_sums(values: Float[Tensor, " slot"], bounds: Int[Tensor, " segment_and_one"]) -> Float[Tensor, " segment"]:
    return torch.segment_reduce(values, "sum", offsets=bounds, unsafe=True)
