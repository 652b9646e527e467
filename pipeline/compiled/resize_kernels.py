"""Pillow's resize and the normalization of its pixels, compiled by Numba: the same bytes in a third of the time.

Legend: S side of the square output; h×w window of an image that the filter sees.

Pillow sums pixels times weights of 22 fractional bits in 32-bit integers, first along one axis, rounded to bytes, then
along the other. Integer sums do not depend on their order, so all that has to agree are the weights, and which axis
comes first. Here the inner loop runs over all rows at once, or all columns, with one weight for all of them, which is
what vector instructions are made for. That takes the columns of an image one after the other in memory: stripes of rows
are transposed, with a fourth byte beside each pixel's three, so that a pixel is one number.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
from numba import njit, types

from pipeline.compiled.compile import compiled

BITS = 22
HALF = 1 << (BITS - 1)
STRIPE = 256  # rows that are transposed at a time: their pixels stay in the second cache


PIXELS = types.Array(types.uint8, 2, "C", readonly=True)  # or writable
BOX = types.UniTuple(types.float32, 4)
WINDOW = types.UniTuple(types.int64, 4)


@njit(nogil=True)
def axis_weights(size, start, end, side, cubic):
    """For each of `side` places of the output the first pixel of its sum, their number, and their weights."""
    scale = np.float64(np.float32(end) - np.float32(start)) / side  # Pillow has boxes in float32
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    inverse = 1.0 / stretch
    first, count = np.empty(side, np.int64), np.empty(side, np.int64)
    weights = np.zeros((side, int(np.ceil(support)) * 2 + 1), np.int32)
    exact = np.empty(weights.shape[1])
    for i in range(side):
        center = np.float32(start) + (i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), size)
        total = 0.0
        for k in range(high - low):
            exact[k] = hat((k + low - center + 0.5) * inverse, cubic)
            total += exact[k]
        for k in range(high - low):
            share = (exact[k] / total if total != 0.0 else exact[k]) * (1 << BITS)
            weights[i, k] = int(share - 0.5) if share < 0 else int(share + 0.5)
        first[i], count[i] = low, high - low
    return first, count, weights


@njit(nogil=True)
def hat(x, cubic):
    """The filter at a distance of x pixels: bilinear, or bicubic with a = −0.5."""
    x = abs(x)
    if not cubic:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2.0 else 0.0


# In these loops every number is cast to 32 bits: Numba's own rule makes 64 of two 32-bit integers.
@njit(nogil=True)
def begin(sums, row, weight):
    for i in range(len(sums)):
        sums[i] = np.int32(HALF + np.int32(np.int32(row[i]) * weight))


@njit(nogil=True)
def add(sums, row, weight):
    for i in range(len(sums)):
        sums[i] = np.int32(sums[i] + np.int32(np.int32(row[i]) * weight))


@njit(nogil=True)
def add_two(sums, row, weight, other, other_weight):
    for i in range(len(sums)):
        more = np.int32(np.int32(np.int32(row[i]) * weight) + np.int32(np.int32(other[i]) * other_weight))
        sums[i] = np.int32(sums[i] + more)


@njit(nogil=True)
def to_bytes(sums, out):
    for i in range(len(sums)):
        value = np.int32(sums[i] >> BITS)
        value = np.int32(0) if value < 0 else value
        out[i] = np.uint8(np.int32(255) if value > 255 else value)


@njit(nogil=True)
def weigh_rows(rows, start, first, count, weights, sums, out):
    """Writes to `out` the weighted sum of `count` rows, from their byte `start` on."""
    end = start + len(sums)
    begin(sums, rows[first, start:end], weights[0])
    k = 1
    while k + 1 < count:
        add_two(sums, rows[first + k, start:end], weights[k], rows[first + k + 1, start:end], weights[k + 1])
        k += 2
    if k < count:
        add(sums, rows[first + k, start:end], weights[k])
    to_bytes(sums, out)


@njit(nogil=True)
def resize_height(rows, top, start, first, count, weights, out):
    """Resizes the height of `rows`, from row `top` and byte `start` on, to out [S, bytes]."""
    sums = np.empty(out.shape[1], np.int32)
    for y in range(out.shape[0]):
        weigh_rows(rows, start, top + first[y], count[y], weights[y], sums, out[y])


@njit(nogil=True)
def pack(row, out):
    """Writes RGB pixels [3·w] as numbers [w], whose bytes are R, G, B and 0."""
    for x in range(len(out)):
        green, blue = np.uint32(row[3 * x + 1]) << np.uint32(8), np.uint32(row[3 * x + 2]) << np.uint32(16)
        out[x] = np.uint32(row[3 * x]) | green | blue


@njit(nogil=True)
def resize_width(rows, top, left, first, count, weights, flip, out):
    """Resizes the width of RGB rows [.., 3·w], from row `top` and pixel `left` on, to RGBX: out uint32 [n, S]."""
    n, side = out.shape
    begin_at = first[0]
    width = first[side - 1] + count[side - 1] - begin_at
    stripe = min(n, STRIPE)
    packed = np.empty((stripe, width), np.uint32)
    columns, resized = np.empty((width, stripe), np.uint32), np.empty((side, stripe), np.uint32)
    columns_bytes, resized_bytes = columns.view(np.uint8), resized.view(np.uint8)
    all_sums = np.empty(4 * stripe, np.int32)
    from_byte = 3 * (left + begin_at)
    for s in range(0, n, stripe):
        m = min(stripe, n - s)
        for y in range(m):
            pack(rows[top + s + y, from_byte : from_byte + 3 * width], packed[y])
        for x in range(width):
            for y in range(m):
                columns[x, y] = packed[y, x]
        sums = all_sums[: 4 * m]
        for x in range(side):
            to = side - 1 - x if flip else x
            weigh_rows(columns_bytes, 0, first[x] - begin_at, count[x], weights[x], sums, resized_bytes[to, : 4 * m])
        for x in range(side):
            for y in range(m):
                out[s + y, x] = resized[x, y]


@compiled(PIXELS, WINDOW, BOX, types.boolean, types.boolean, types.boolean, types.uint32[:, ::1])
def resize(pixels, window, box, cubic, flip, height_first, out):
    """Resizes a part of an image as Pillow does.

    Args:
        pixels: uint8 [height, 3·width]: RGB.
        window: (y0, x0, y1, x1): the pixels that the filter sees.
        box: (y0, x0, y1, x1) in pixels of the window, float32: the part that becomes the output.
        cubic: Bicubic instead of bilinear.
        flip: Mirror the output, left to right.
        height_first: Resize the height before the width.
        out: uint32 [S, S]: RGBX, as bytes in this order.
    """
    side = out.shape[0]
    top, left, bottom, right = window
    rows = axis_weights(bottom - top, box[0], box[2], side, cubic)
    columns = axis_weights(right - left, box[1], box[3], side, cubic)
    if height_first:
        narrow = np.empty((side, 3 * (right - left)), np.uint8)
        resize_height(pixels, top, 3 * left, *rows, narrow)
        resize_width(narrow, 0, 0, *columns, flip, out)
    else:
        first, count, weights = rows
        seen = first[side - 1] + count[side - 1] - first[0]
        short = np.empty((seen, side), np.uint32)
        resize_width(pixels, top + first[0], left, *columns, flip, short)
        resize_height(short.view(np.uint8), 0, 0, first - first[0], count, weights, out.view(np.uint8))


@compiled(PIXELS, types.float32[::1], types.float32[::1], types.float32[:, :, ::1])
def normalize(pixels, mean, scale, out):
    """Writes (pixel − mean) · scale of RGBX pixels, uint8 [S, 4·S], to float32 out [3, S, S]."""
    for c in range(3):
        average, factor = mean[c], scale[c]
        for y in range(len(pixels)):
            row, line = pixels[y], out[c, y]
            for x in range(len(line)):
                line[x] = (np.float32(row[4 * x + c]) - average) * factor
