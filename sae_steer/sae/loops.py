"""The compiled loops behind `compiled`: plain arrays in, plain arrays filled; nothing here knows torch.

Every loop takes the first and last row, or feature, it is to do. What loops share is inlined: a library of its own is
optimised otherwise when numba reads it from its cache than when it has just compiled it, and a first run would then
end in other bytes than a second.
"""

from inspect import unwrap

import numpy as np
from numba import njit

_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}  # sums may be cut into lanes; NaN and infinity keep their meaning


def _compiled(**options):
    """`njit` of the function as written, without the shape checks that tests wrap around every function."""
    return lambda function: njit(**_OPTIONS, **options)(unwrap(function))


def _shared(**options):
    return _compiled(inline="always", **options)


@_shared()
def _bound(ordered, count, k):
    """The largest v >= 1 that at least k of the first `count` integers reach, or 1; one bit of v a round."""
    low = ordered.dtype.type(0)
    for bit in range(8 * ordered.itemsize - 2, -1, -1):
        tried = ordered.dtype.type(low | (1 << bit))
        above = np.int32(0)
        for j in range(count):
            above += np.int32(ordered[j] >= tried)
        if above >= k:
            low = tried
    return max(low, ordered.dtype.type(1))


@_compiled()
def select_topk(start, stop, pre, k, indices, values, counts):
    """The k largest entries above zero of bfloat16 rows given as int16 bits; the lowest index among equals."""
    d_sae = pre.shape[1]
    maxima, hits, kept, where = _space_to_choose(d_sae, k)
    for n in range(start, stop):
        row = pre[n]
        _lane_maxima(row, maxima)
        found = _at_least(row, maxima, _bound(maxima, len(maxima), k), hits, kept, where)
        counts[n] = _cut_to_k(kept, where, found, k, d_sae, indices[n])
        for i in range(counts[n]):
            values[n, i] = _widened(row[indices[n, i]])


@_compiled(fastmath=_REORDERED)
def screened_topk(
    start, stop, x, W, b_enc, products, x_scales, W_scales, k, spread, most, indices, values, counts
):  # fmt: skip
    """The k largest pre-activations above zero of bfloat16 weights, found by those in int8, off by some error.

    The k largest in int8 are computed; how far the two differ tells the error (root mean square), and the least of
    them how low an entry can be in int8 and yet, `spread` times that error off, be among the k largest; more times
    where some feature's scale is beyond those of the k. All as high as that are computed as well. Where they are more
    than `most`, or reach zero, the row's count is -1.
    """
    widest = np.float32(0)
    for j in range(len(W_scales)):
        widest = max(widest, W_scales[j])
    d_sae = products.shape[1]
    maxima, hits, kept, where = _space_to_choose(d_sae, k)
    bits, dots = np.empty(d_sae, np.int16), np.empty(most, np.float32)
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


@_shared()
def _least(values, count):
    """Where the least of the first `count` numbers stands; the first of them among equals."""
    least = np.float32(np.inf)
    for i in range(count):
        least = min(least, values[i])
    for i in range(count):
        if values[i] == least:
            return i
    return 0


@_shared(fastmath=_REORDERED)
def _dots(row, table, indices, used, dots):
    """The products of a row with rows of a bfloat16 table, given as int16 bits, four at a time."""
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


@_shared()
def _widened(bits):
    """The bfloat16 number of these bits in float32."""
    return np.uint32(np.uint32(np.uint16(bits)) << np.uint32(16)).view(np.float32)


@_shared()
def _space_to_choose(d_sae, k):
    """Where the largest of every lane of a row go, and what is found on the way to its k largest entries."""
    lanes = min(d_sae, max(512, 8 * k))
    return np.empty(lanes, np.int16), np.empty(lanes, np.int32), np.empty(d_sae, np.int16), np.empty(d_sae, np.int32)


@_shared()
def _lane_maxima(row, maxima):
    """The largest of the entries j, j + lanes, j + 2 lanes, ... for every j below lanes.

    Positive bfloat16 numbers order as their bits do, and negative ones are below zero as integers too.
    """
    lanes = len(maxima)
    for j in range(lanes):
        maxima[j] = row[j]
    for first in range(lanes, len(row), lanes):
        part = row[first : first + lanes]
        for j in range(len(part)):  # `max` would widen to 64 bits: thirty times slower
            maxima[j] = part[j] if part[j] > maxima[j] else maxima[j]


@_shared()
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


@_shared()
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


@_compiled()
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


@_compiled()
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


@_compiled(fastmath=_REORDERED)
def reconstruct(start, stop, x, W_dec, b_dec, indices, values, counts, prefixes, scale, errors, slopes, squared_errors):
    """Errors of every prefix's reconstruction, summed from the longest down, and their dots with the codes' rows."""
    last = len(prefixes) - 1
    for n in range(start, stop):
        used, begin = counts[n], 0
        for number in range(last + 1):
            error = errors[number, n]
            for i in range(len(error)):
                error[i] = errors[number - 1, n, i] if number else b_dec[i] - x[n, i]
            _add_rows(error, W_dec, indices[n], values[n], used, begin, prefixes[number])
            begin = prefixes[number]
            total = np.float32(0)
            for i in range(len(error)):
                total += error[i] * error[i]
            squared_errors[number, n] = total
        for number in range(last, -1, -1):
            for i in range(len(b_dec)):
                longer = errors[number + 1, n, i] if number < last else np.float32(0)
                errors[number, n, i] = errors[number, n, i] * scale + longer
        for i in range(used):
            number = 0
            while indices[n, i] >= prefixes[number]:
                number += 1
            error, row, dot = errors[number, n], W_dec[indices[n, i]], np.float32(0)
            for d in range(len(error)):
                dot += error[d] * row[d]
            slopes[n, i] = dot if values[n, i] > 0 else np.float32(0)


@_shared(fastmath=_REORDERED)
def _add_rows(total, table, indices, values, used, low, high):
    """Add values[i] * table[indices[i]] for the indices in [low, high), four at a time."""
    waiting = np.empty(4, np.int64)
    held = 0
    for i in range(used):
        if low <= indices[i] < high:
            waiting[held] = i
            held += 1
        if held == 4:
            a, b, c, d = waiting[0], waiting[1], waiting[2], waiting[3]
            ra, rb, rc, rd = table[indices[a]], table[indices[b]], table[indices[c]], table[indices[d]]
            va, vb, vc, vd = values[a], values[b], values[c], values[d]
            for j in range(len(total)):
                total[j] += va * ra[j] + vb * rb[j] + vc * rc[j] + vd * rd[j]
            held = 0
    for at in range(held):
        row, value = table[indices[waiting[at]]], values[waiting[at]]
        for j in range(len(total)):
            total[j] += value * row[j]


@_compiled()
def sort_by_feature(indices, counts, starts, order):
    """A counting sort: order[starts[j] : starts[j + 1]] are the slots of feature j's codes, rows rising."""
    rows, width = indices.shape
    for n in range(rows):
        for i in range(counts[n]):
            starts[indices[n, i] + 1] += 1
    for j in range(len(starts) - 1):
        starts[j + 1] += starts[j]
    total = starts[len(starts) - 1]
    for n in range(rows - 1, -1, -1):
        for i in range(counts[n] - 1, -1, -1):
            feature = indices[n, i]
            starts[feature + 1] -= 1
            order[starts[feature + 1]] = n * width + i
    for j in range(len(starts) - 1):
        starts[j] = starts[j + 1]
    starts[len(starts) - 1] = total


@_shared(fastmath=_REORDERED)
def _sum_rows(g_enc, g_dec, slots, x, errors, value, slope, width):
    """Add a feature's codes to its two gradients; returns the sum of its slopes and how often it fires."""
    total, fires, at = np.float32(0), np.int32(0), 0
    while at + 4 <= len(slots):  # four rows a pass: a quarter of the loads and stores of the sums
        a, b, c, d = slots[at], slots[at + 1], slots[at + 2], slots[at + 3]
        ea, eb, ec, ed = errors[a // width], errors[b // width], errors[c // width], errors[d // width]
        xa, xb, xc, xd = x[a // width], x[b // width], x[c // width], x[d // width]
        va, vb, vc, vd = value[a], value[b], value[c], value[d]
        sa, sb, sc, sd = slope[a], slope[b], slope[c], slope[d]
        for i in range(len(g_enc)):
            g_dec[i] += va * ea[i] + vb * eb[i] + vc * ec[i] + vd * ed[i]
            g_enc[i] += sa * xa[i] + sb * xb[i] + sc * xc[i] + sd * xd[i]
        total += sa + sb + sc + sd
        fires += np.int32(va > 0) + np.int32(vb > 0) + np.int32(vc > 0) + np.int32(vd > 0)
        at += 4
    while at < len(slots):
        a = slots[at]
        ea, xa, va, sa = errors[a // width], x[a // width], value[a], slope[a]
        for i in range(len(g_enc)):
            g_dec[i] += va * ea[i]
            g_enc[i] += sa * xa[i]
        total += sa
        fires += np.int32(va > 0)
        at += 1
    return total, fires


@_shared(fastmath=_REORDERED)
def _adam(weight, first, second, gradient, lr, eps, correction):
    for i in range(len(weight)):
        first[i] = np.float32(0.9) * first[i] + np.float32(0.1) * gradient[i]
        second[i] = np.float32(0.999) * second[i] + np.float32(0.001) * gradient[i] * gradient[i]
        weight[i] -= lr * first[i] / (np.sqrt(second[i]) * correction + eps)


@_compiled(fastmath=_REORDERED)
def step_features(
    start, stop, block, x, b_dec, prefixes,
    starts, order, values, slopes, errors, width,
    dead_starts, dead_order, dead_values, dead_slopes, dead_errors, dead_width,
    W_enc, W_dec, low, coarse, scales, enc_first, enc_second, dec_first, dec_second,
    lr, eps, correction, b_enc, fired, through,
):  # fmt: skip
    """Gradients and Adam of the features of blocks start to stop; each decoder row back to norm one."""
    d_in = x.shape[1]
    g_enc, g_dec = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
    for j in range(start * block, min(stop * block, len(W_enc))):
        number = 0
        while j >= prefixes[number]:
            number += 1
        for i in range(d_in):
            g_enc[i] = g_dec[i] = 0
        mine = order[starts[j] : starts[j + 1]]
        total, fired[j] = _sum_rows(g_enc, g_dec, mine, x, errors[number], values, slopes, width)
        mine = dead_order[dead_starts[j] : dead_starts[j + 1]]
        if len(mine):
            total += _sum_rows(g_enc, g_dec, mine, x, dead_errors[0], dead_values, dead_slopes, dead_width)[0]
        b_enc[j] = total
        encoder, decoder = W_enc[j], W_dec[j]
        along = np.float32(0)
        for i in range(d_in):
            g_enc[i] -= total * b_dec[i]
            through[j // block, i] += total * encoder[i]
            along += g_dec[i] * decoder[i]
        for i in range(d_in):
            g_dec[i] -= along * decoder[i]
        _adam(encoder, enc_first[j], enc_second[j], g_enc, lr, eps, correction)
        _adam(decoder, dec_first[j], dec_second[j], g_dec, lr, eps, correction)
        square = np.float32(0)
        for i in range(d_in):
            square += decoder[i] * decoder[i]
        square = np.float32(1) / np.sqrt(square)
        for i in range(d_in):
            decoder[i] *= square
        if len(low):
            _round_to_bfloat16(encoder, low[j])
        if len(coarse):
            scales[j] = _round_to_int8(encoder, coarse[j])


@_shared()
def _round_to_bfloat16(row, bits):
    """The upper 16 bits of float32, rounded to nearest, ties to even."""
    for i in range(len(row)):
        whole = np.float32(row[i]).view(np.uint32)
        whole += np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))
        bits[i] = np.int16(whole >> np.uint32(16))


@_compiled()
def round_to_int8(start, stop, rows, origin, centred, rounded, scales):
    """Every row minus the origin, and that as int8 times a scale of its own."""
    for n in range(start, stop):
        for i in range(len(origin)):
            centred[n, i] = rows[n, i] - origin[i]
        scales[n] = _round_to_int8(centred[n], rounded[n])


@_shared()
def _round_to_int8(row, rounded):
    largest = np.float32(0)
    for i in range(len(row)):
        size = abs(row[i])
        largest = size if size > largest else largest
    inverse = np.float32(127) / largest if largest > 0 else np.float32(0)
    for i in range(len(row)):
        rounded[i] = np.int8(np.rint(row[i] * inverse))
    return largest * np.float32(1 / 127)  # forms that every caller's compilation leaves as they are
