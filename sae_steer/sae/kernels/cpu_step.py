"""The other compiled loops behind `compiled`: reconstruction, gradients, Adam, rounding; plain arrays in and filled.

Every loop takes the first and last row, or feature, it is to do.
"""

import numpy as np

from sae_steer.sae.kernels.jit import REORDERED, loop, shared


@loop(fastmath=REORDERED)
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


@shared(fastmath=REORDERED)
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


@loop()
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


@shared(fastmath=REORDERED)
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


@shared(fastmath=REORDERED)
def _adam(weight, first, second, gradient, lr, eps, correction):
    for i in range(len(weight)):
        first[i] = np.float32(0.9) * first[i] + np.float32(0.1) * gradient[i]
        second[i] = np.float32(0.999) * second[i] + np.float32(0.001) * gradient[i] * gradient[i]
        weight[i] -= lr * first[i] / (np.sqrt(second[i]) * correction + eps)


@loop(fastmath=REORDERED)
def step_features(
    start, stop, block, x, b_dec, prefixes,
    starts, order, values, slopes, errors, width,
    dead_starts, dead_order, dead_values, dead_slopes, dead_errors, dead_width,
    W_enc, W_dec, low, coarse, scales, enc_first, enc_second, dec_first, dec_second,
    levels, unit, lr, eps, correction, b_enc, fired, through,
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
            scales[j] = _round_to_int8(encoder, coarse[j], levels, unit)


@shared()
def _round_to_bfloat16(row, bits):
    """The upper 16 bits of float32, rounded to nearest, ties to even."""
    for i in range(len(row)):
        whole = np.float32(row[i]).view(np.uint32)
        whole += np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))
        bits[i] = np.int16(whole >> np.uint32(16))


@loop()
def round_to_int8(start, stop, rows, origin, levels, unit, centred, rounded, scales):
    """Every row minus the origin, and that as whole numbers up to `levels` times a scale; `unit` is 1 / levels."""
    for n in range(start, stop):
        for i in range(len(origin)):
            centred[n, i] = rows[n, i] - origin[i]
        scales[n] = _round_to_int8(centred[n], rounded[n], levels, unit)


@shared()
def _round_to_int8(row, rounded, levels, unit):
    largest = np.float32(0)
    for i in range(len(row)):
        size = abs(row[i])
        largest = size if size > largest else largest
    inverse = levels / largest if largest > 0 else np.float32(0)
    for i in range(len(row)):
        rounded[i] = np.int8(np.rint(row[i] * inverse))
    return largest * unit  # forms that every caller's compilation leaves as they are
