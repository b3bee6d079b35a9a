"""The compiled loops that choose the codes of a row: plain arrays in, plain arrays filled; nothing here knows torch.

Every loop takes the first and last row it is to do. Rows to choose from come as the bits of their numbers, int16 for
bfloat16 and int32 for float32: positive numbers order as their bits do, and negative ones are below zero as integers
too.
"""

import numpy as np
from numba import types
from numba.extending import overload

from sae_steer.sae.kernels.jit import REORDERED, loop, shared


@shared()
def _bound(ordered, count, k):
    """The largest v >= 1 that at least k of the first `count` entries reach, or 1; one bit of v a round."""
    integer = ordered.dtype.type
    low = integer(0)
    for bit in range(8 * ordered.itemsize - 2, -1, -1):
        tried = integer(low | (1 << bit))
        above = np.int32(0)
        for j in range(count):
            above += np.int32(ordered[j] >= tried)
        if above >= k:
            low = tried
    return max(low, integer(1))


@loop()
def select_topk(start, stop, pre, k, indices, values, counts):
    """The k largest entries above zero of rows given as bits; the lowest index among equals."""
    d_sae = pre.shape[1]
    maxima, hits, kept, where = _space_to_choose(pre, d_sae, k)
    for n in range(start, stop):
        row = pre[n]
        _lane_maxima(row, maxima)
        found = _at_least(row, maxima, _bound(maxima, len(maxima), k), hits, kept, where)
        counts[n] = _cut_to_k(kept, where, found, k, d_sae, indices[n])
        for i in range(counts[n]):
            values[n, i] = _widened(row[indices[n, i]])


@loop(fastmath=REORDERED)
def screened_topk(
    start, stop, x, W, b_enc, products, x_scales, W_scales, k, spread, most, indices, values, counts
):  # fmt: skip
    """The k largest pre-activations above zero, found by those in int8, off by some error.

    `W` is float32, or the bits of bfloat16.

    The k largest in int8 are computed; how far the two differ tells the error (root mean square), and the least of
    them how low an entry can be in int8 and yet, `spread` times that error off, be among the k largest; more times
    where some feature's scale is beyond those of the k. All as high as that are computed as well. Where they are more
    than `most`, or reach zero, the row's count is -1.
    """
    widest = np.float32(0)
    for j in range(len(W_scales)):
        widest = max(widest, W_scales[j])
    d_sae = len(W_scales)
    bits, dots = np.empty(d_sae, np.int16), np.empty(most, np.float32)
    maxima, hits, kept, where = _space_to_choose(bits, d_sae, k)
    for n in range(start, stop):
        for j in range(d_sae):
            near = np.float32(products[n, j]) * (x_scales[n] * W_scales[j]) + b_enc[j]
            bits[j] = np.int16(np.float32(near).view(np.int32) >> 16)
        _lane_maxima(bits, maxima)
        found = _at_least(bits, maxima, _bound(maxima, len(maxima), k), hits, kept, where)
        found = _cut_to_k(kept, where, found, k, d_sae, indices[n])
        _dots(x[n], W, indices[n], found, values[n])
        squares = scales = np.float32(0)
        for i in range(found):
            j = indices[n, i]
            scales += W_scales[j]
            values[n, i] += b_enc[j]
            near = np.float32(products[n, j]) * (x_scales[n] * W_scales[j]) + b_enc[j]
            squares += (values[n, i] - near) ** 2
            bits[j] = -1  # not to be found again
        last = _least(values[n], found)
        error = np.sqrt(squares / np.float32(k)) * max(np.float32(1), widest * np.float32(k) / scales)
        floor = values[n, last] - spread * error
        fresh, counts[n] = most + 1, -1
        if found == k and floor > 0:
            fresh = _at_least(bits, maxima, np.int16(np.float32(floor).view(np.int32) >> 16), hits, kept, where)
        if fresh <= most:
            counts[n] = k
            _dots(x[n], W, where, fresh, dots)
            for i in range(fresh):
                value = dots[i] + b_enc[where[i]]
                if value > values[n, last]:
                    indices[n, last], values[n, last] = where[i], value
                    last = _least(values[n], k)


@shared()
def _least(values, count):
    """Where the least of the first `count` numbers stands; the first of them among equals."""
    least = np.float32(np.inf)
    for i in range(count):
        least = min(least, values[i])
    for i in range(count):
        if values[i] == least:
            return i
    return 0


@shared(fastmath=REORDERED)
def _dots(row, table, indices, used, dots):
    """The products of a row with rows of a table, float32 or the bits of bfloat16, four at a time."""
    for first in range(0, used, 4):
        last = used - 1
        ra, rb = table[indices[first]], table[indices[min(first + 1, last)]]
        rc, rd = table[indices[min(first + 2, last)]], table[indices[min(first + 3, last)]]
        a = b = c = d = np.float32(0)
        for i in range(len(row)):
            a += row[i] * _widened(ra[i])
            b += row[i] * _widened(rb[i])
            c += row[i] * _widened(rc[i])
            d += row[i] * _widened(rd[i])
        dots[first], dots[min(first + 1, last)] = a, b
        dots[min(first + 2, last)], dots[min(first + 3, last)] = c, d


def _widened(number):
    """A number in float32, given as the bits of bfloat16 (int16), of float32 (int32), or as it is."""


@overload(_widened, inline="always")
def _widened_by_type(number):
    if number is types.int16:
        return lambda number: np.uint32(np.uint32(np.uint16(number)) << np.uint32(16)).view(np.float32)
    return (lambda number: np.int32(number).view(np.float32)) if number is types.int32 else (lambda number: number)


@shared()
def _space_to_choose(rows, d_sae, k):
    """Where the largest of every lane of a row go, and what is found on the way to its k largest entries."""
    lanes = min(d_sae, max(512, 8 * k))
    kind = rows.dtype
    return np.empty(lanes, kind), np.empty(lanes, np.int32), np.empty(d_sae, kind), np.empty(d_sae, np.int32)


@shared()
def _lane_maxima(row, maxima):
    """The largest of the entries j, j + lanes, j + 2 lanes, ... for every j below lanes."""
    lanes = len(maxima)
    for j in range(lanes):
        maxima[j] = row[j]
    for first in range(lanes, len(row), lanes):
        part = row[first : first + lanes]
        for j in range(len(part)):  # `max` would widen to 64 bits: thirty times slower
            maxima[j] = part[j] if part[j] > maxima[j] else maxima[j]


@shared()
def _at_least(row, maxima, bound, hits, kept, where):
    """Write the entries that reach the bound, and their places; returns how many there are."""
    lanes, hit, found = len(maxima), 0, 0  # what is below the bound is overwritten by the next: no branch to guess
    for j in range(lanes):
        hits[hit] = j
        hit += np.int32(maxima[j] >= bound)
    for at in range(hit):
        for i in range(hits[at], len(row), lanes):
            kept[found], where[found] = row[i], i
            found += np.int32(row[i] >= bound)
    return found


@shared()
def _cut_to_k(kept, where, found, k, d_sae, chosen):
    """Write the places of the k largest of the first `found` to `chosen`; returns how many there are."""
    if found <= k:
        for i in range(found):
            chosen[i] = where[i]
        return found
    least = _bound(kept, found, k)
    taken = 0
    for i in range(found):
        if kept[i] > least:
            chosen[taken] = where[i]
            taken += 1
    before = -1
    while taken < k:  # those equal to the least, the lowest places first
        lowest = d_sae
        for i in range(found):
            if kept[i] == least and before < where[i] < lowest:
                lowest = where[i]
        chosen[taken], before = lowest, lowest
        taken += 1
    return taken


@loop()
def select_above(start, stop, pre, floor, indices, values, counts):
    """The entries above their floor; a row with more than there are slots says so in its count and loses the rest."""
    d_sae, width = pre.shape[1], indices.shape[1]
    lanes = min(d_sae, 256)
    for n in range(start, stop):
        row, found = pre[n], 0
        for first in range(0, d_sae, lanes):  # most blocks of 256 are looked at twice, at vector speed the first time
            part, bar = row[first : first + lanes], floor[first : first + lanes]
            any_above = np.int32(0)
            for j in range(len(part)):
                any_above += np.int32(part[j] > bar[j])
            if any_above:
                for j in range(len(part)):
                    if part[j] > bar[j]:
                        if found < width:
                            indices[n, found], values[n, found] = first + j, part[j]
                        found += 1
        counts[n] = found


@loop()
def keep_at_least(start, stop, least, indices, values, counts):
    """Move each row's codes of value `least` or more to the front, and clear the rest."""
    for n in range(start, stop):
        taken = 0
        for i in range(counts[n]):
            if values[n, i] >= least:
                indices[n, taken], values[n, taken] = indices[n, i], values[n, i]
                taken += 1
        for i in range(taken, counts[n]):
            values[n, i] = 0
        counts[n] = taken
