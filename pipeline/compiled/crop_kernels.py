"""The label crop of stored rows, compiled by Numba: decoded and averaged over tokens in one pass, plane by plane.

Legend: B images; P palette size; H×W map grid; h×w token grid, T = h·w.

A token touches few cells, so only the cells of its span are summed, along the height first, as `crop_score_maps` does
with whole matrices. Planes go through in groups of eight, one lane each, so that every sum is one vector instruction.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
from numba import njit, types

from pipeline.compiled.compile import compiled

LANES = 8
ROUNDING = 1e-5  # as in `pipeline.geometry`

CODES = types.Array(types.uint8, 4, "C", readonly=True)
PLANES = types.Array(types.uint8, 3, "C", readonly=True)
VALUES = types.Array(types.float32, 1, "C", readonly=True)
INDEX = types.Array(types.int64, 1, "C", readonly=True)
BOXES = types.Array(types.float64, 2, "C", readonly=True)
AFFINE = types.Array(types.float64, 3, "C", readonly=True)


@njit(nogil=True)
def axis_weights(start, end, gain, shift, bins, weights, spans):
    """ROI-align along one axis, see `pipeline.geometry.axis_weights`: weights [bins, cells], and the span of each."""
    cells = weights.shape[1]
    low, high = start * cells - 0.5, end * cells - 0.5
    extent = high - low
    count = max(1, int(np.ceil(extent / bins - ROUNDING)))
    size = extent / bins
    exact = np.empty(cells)
    for i in range(bins):
        for cell in range(cells):
            exact[cell] = 0
        first, last = cells, 0
        for k in range(count):
            center = low + shift * extent + gain * (i * size) + gain * ((k + 0.5) * size / count)
            center = min(max(min(max(center, low), high), 0.0), cells - 1.0)
            cell = int(center)
            share = center - cell
            exact[cell] += (1 - share) / count
            if cell + 1 < cells:
                exact[cell + 1] += share / count
            first, last = min(first, cell), max(last, min(cell + 2, cells))
        for cell in range(cells):
            weights[i, cell] = exact[cell]
        spans[i, 0], spans[i, 1] = first, last


@njit(nogil=True)
def ends(spans):
    """The first and the last cell that any of them has."""
    first, last = spans[0]
    for i in range(1, len(spans)):
        first, last = min(first, spans[i, 0]), max(last, spans[i, 1])
    return first, last


@njit(nogil=True)
def decode(codes, top, left, shared, values, as_background, lane, out):
    """The part of a plane of codes [H, W] from (top, left) on to its lane of out [.., ..·LANES]."""
    for y in range(len(shared)):
        other, to = shared[y], out[y]
        line = codes[top + y, left : left + len(other)]
        for x in range(len(line)):
            code = line[x]
            to[x * LANES + lane] = other[x] if as_background and code == 0 else values[code]


@njit(nogil=True)
def copy_plane(shared, lane, out):
    """A decoded plane to its lane of out [.., ..·LANES]."""
    for y in range(len(shared)):
        line, to = shared[y], out[y]
        for x in range(len(line)):
            to[x * LANES + lane] = line[x]


@njit(nogil=True)
def write_lane(out, lane, tokens):
    """A lane of out [T + 1, LANES] to the tokens [T]; returns that of the whole crop."""
    for t in range(len(tokens)):
        tokens[t] = out[t, lane]
    return out[len(tokens), lane]


@njit(nogil=True, fastmath={"contract"})
def add(total, weight, line):
    for k in range(len(total)):
        total[k] += weight * line[k]


@njit(nogil=True, fastmath={"contract"}, inline="always")
def weigh(cells, left, weights, first, last, out):
    """The weighted sum of a span of cells, from `left` on: a variable for each lane, to stay in one register."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
    for x in range(first, last):
        weight, cell = weights[x], cells[(x - left) * LANES : (x - left + 1) * LANES]
        s0 += weight * cell[0]
        s1 += weight * cell[1]
        s2 += weight * cell[2]
        s3 += weight * cell[3]
        s4 += weight * cell[4]
        s5 += weight * cell[5]
        s6 += weight * cell[6]
        s7 += weight * cell[7]
    out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7] = s0, s1, s2, s3, s4, s5, s6, s7


@njit(nogil=True)
def crop_group(cells, top, left, along_y, span_y, along_x, span_x, band, out):
    """A group of planes, from cell (top, left) on, to tokens and the whole crop, out [T + 1, LANES]."""
    h, w = len(along_y) - 1, len(along_x) - 1
    for i in range(h + 1):
        band[:] = 0
        for y in range(span_y[i, 0], span_y[i, 1]):
            add(band, along_y[i, y], cells[y - top])
        if i == h:
            weigh(band, left, along_x[w], span_x[w, 0], span_x[w, 1], out[h * w])
        else:
            for j in range(w):
                weigh(band, left, along_x[j], span_x[j, 0], span_x[j, 1], out[i * w + j])


@compiled(
    CODES, PLANES, VALUES, types.boolean, BOXES, AFFINE, INDEX, types.int64, types.int64, types.float32[:, :, ::1],
    types.float32[:, ::1], types.float32[:, ::1], types.float32[::1],
)  # fmt: skip
def crop_rows(
    codes, background, values, as_background, boxes, affine, which, h, w, tokens, token_background, cls, cls_background
):
    """Decodes rows and crops them to the token grid and to the whole crop.

    Args:
        codes: uint8 [B, P, H, W].
        background: uint8 [B, H, W].
        values: float32 [256]: the score of each code.
        as_background: Whether code 0 of a palette plane stands for the background's score.
        boxes: float64 [B, 4]: the crops, as fractions of the maps.
        affine: float64 [B, 2, 3]: maps from input to crop, without rotation and shear.
        which: int64: the rows to crop.
        h: Token grid.
        w: Token grid.
        tokens: float32 [B, P, T], written.
        token_background: float32 [B, T], written.
        cls: float32 [B, P], written.
        cls_background: float32 [B], written.
    """
    _, planes, rows, columns = codes.shape
    along_y, span_y = np.empty((h + 1, rows), np.float32), np.empty((h + 1, 2), np.int64)
    along_x, span_x = np.empty((w + 1, columns), np.float32), np.empty((w + 1, 2), np.int64)
    background_room, room = np.empty(rows * columns, np.float32), np.empty(rows * columns * LANES, np.float32)
    band_room, out = np.empty(columns * LANES, np.float32), np.empty((h * w + 1, LANES), np.float32)
    for b in which:
        (y0, x0, y1, x1), map_y, map_x = boxes[b], affine[b, 0], affine[b, 1]
        axis_weights(y0, y1, map_y[0], map_y[2], h, along_y[:h], span_y[:h])
        axis_weights(y0, y1, map_y[0], map_y[2], 1, along_y[h:], span_y[h:])
        axis_weights(x0, x1, map_x[1], map_x[2], w, along_x[:w], span_x[:w])
        axis_weights(x0, x1, map_x[1], map_x[2], 1, along_x[w:], span_x[w:])
        top, bottom = ends(span_y)
        left, right = ends(span_x)
        # Only what the crop touches; contiguous, which makes the loops over it fast.
        seen = (bottom - top, right - left)
        shared = background_room[: seen[0] * seen[1]].reshape(seen)
        cells = room[: shared.size * LANES].reshape(seen[0], seen[1] * LANES)
        band = band_room[: seen[1] * LANES]
        for y in range(seen[0]):
            for x in range(seen[1]):
                shared[y, x] = values[background[b, top + y, left + x]]
        for first in range(0, planes + 1, LANES):
            lanes = min(LANES, planes + 1 - first)
            for lane in range(lanes):
                if first + lane < planes:
                    decode(codes[b, first + lane], top, left, shared, values, as_background, lane, cells)
                else:
                    copy_plane(shared, lane, cells)
            crop_group(cells, top, left, along_y, span_y, along_x, span_x, band, out)
            for lane in range(lanes):
                if first + lane < planes:
                    cls[b, first + lane] = write_lane(out, lane, tokens[b, first + lane])
                else:
                    cls_background[b] = write_lane(out, lane, token_background[b])
