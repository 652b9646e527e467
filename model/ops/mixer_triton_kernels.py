"""Triton kernels of what surrounds the scan in a Mamba mixer; `mixer_triton.py` calls them.

Legend: K directions, B batch, L length, E inner width, W taps of the convolution, S segments of an image's rows.
x, z, out and their gradients [B, L, E], with strides; u, y [K, B, L, E]; taps [K, W + 1, E], the bias last. For each
direction, with s = 1, or −1 if its bit of BACKWARDS is set:

    u_t = silu(bias + Σ_w taps_w x_{t − s (W − 1 − w)})
    out_t = silu(z_t) Σ_k y_{k,t} / 2 or undivided, by a factor

Kernels compute in float32 and store in the tensors' dtypes. Both directions share a program, so that x is read once and
its gradient written once.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from model.ops.scan_triton_kernels import LOG2_E, load, store


@triton.jit
def sigmoid(x):
    """For any x: exp(−x) may be infinite, and 1 / ∞ is 0."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def conv_forward(
    x, taps, u, batch, L, image_stride, row_stride,
    E: tl.constexpr, K: tl.constexpr, W: tl.constexpr, BACKWARDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    """u of ROWS rows and BLOCK_E channels of an image, in all directions."""
    P: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0)
    tiles = tl.cdiv(L, ROWS)
    e = ((program % P) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    t = ((program // P % tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    image = (program // P // tiles).to(tl.int64)
    x += image * image_stride
    for k in tl.static_range(K):
        total = tl.zeros([ROWS, BLOCK_E], tl.float32) + load(taps + (k * (W + 1) + W) * E + e, e < E, EVEN_E)
        for w in tl.static_range(W):
            row = t - (W - 1 - w) if (BACKWARDS >> k) % 2 == 0 else t + (W - 1 - w)
            seen = tl.load(x + row * row_stride + e, mask=(row >= 0) & (row < L) & (e < E), other=0.0)
            total += load(taps + (k * (W + 1) + w) * E + e, e < E, EVEN_E) * seen.to(tl.float32)
        place = u + (k * batch + image) * L * E + t * E + e
        tl.store(place, (total * sigmoid(total)).to(u.dtype.element_ty), mask=(t < L) & (e < E))


@triton.jit
def conv_backward(
    grad_u, x, taps, gx, gtaps, batch, L, image_stride, row_stride, gx_image_stride, gx_row_stride,
    E: tl.constexpr, K: tl.constexpr, W: tl.constexpr, BACKWARDS: tl.constexpr,
    SEGMENT: tl.constexpr, AHEAD: tl.constexpr, BLOCK_E: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    """gx of a segment of rows, and the program's own share of gtaps [B · S, K, W + 1, E].

    The program walks through its rows with the last W rows of x and, per direction, of the gradient before SiLU in
    registers. A direction that runs forward is W − 1 rows ahead of gx, as its gradient comes from later rows, and the
    walk begins that many rows early.
    """
    P: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    REACH: tl.constexpr = W - 1
    program = tl.program_id(0)
    segments = tl.cdiv(L, SEGMENT)
    e = (program % P) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_e = e < E
    begin = (program // P % segments) * SEGMENT
    end = min(begin + SEGMENT, L)
    image = (program // P // segments).to(tl.int64)
    x += image * image_stride
    gx += image * gx_image_stride
    grad_u += image * L * E
    gtaps += (program // P).to(tl.int64) * (K * (W + 1) * E)
    rest = batch.to(tl.int64) * L * E  # from a direction to the next

    zeros = tl.zeros([BLOCK_E], tl.float32)
    weights, gained = (), ()
    for i in tl.static_range(K * (W + 1)):
        weights += (load(taps + i * E + e, in_e, EVEN_E),)
        gained += (zeros,)
    window, slopes = (zeros,), (zeros,) * (K * W)
    for i in tl.static_range(REACH):
        row = begin - REACH + i
        window += (tl.load(x + row * row_stride + e, mask=e < tl.where(row >= 0, E, 0), other=0.0).to(tl.float32),)
    for start in range(begin - REACH, end, AHEAD):
        xs, gus = (), ()
        for i in tl.static_range(AHEAD):
            row = start + i + REACH
            xs += (tl.load(x + row * row_stride + e, mask=e < tl.where(row < L, E, 0), other=0.0),)
            for k in tl.static_range(K):
                at = row if (BACKWARDS >> k) % 2 == 0 else start + i
                exists = (at >= 0) & (at < L)
                gus += (tl.load(grad_u + k * rest + at * E + e, mask=e < tl.where(exists, E, 0), other=0.0),)
        for i in tl.static_range(AHEAD):
            t = start + i
            # Rows t to t + REACH of x.
            window = window[1:] + (xs[i].to(tl.float32),)  # noqa: RUF005, Triton unpacks no tuples
            total = zeros
            slid, more = (), ()
            for k in tl.static_range(K):
                ahead = (BACKWARDS >> k) % 2 == 0
                at = t + REACH if ahead else t
                before = weights[k * (W + 1) + W]
                for w in tl.static_range(W):
                    before += weights[k * (W + 1) + w] * (window[w] if ahead else window[REACH - w])
                part = sigmoid(before)
                slope = gus[i * K + k].to(tl.float32) * part * (1.0 + before * (1.0 - part))
                # Rows t to t + REACH of a direction that is ahead, t − REACH to t of another.
                here = slopes[k * W + 1 : k * W + W] + (slope,)  # noqa: RUF005
                slid += here
                own = tl.where((at >= begin) & (at < end), slope, 0.0)
                for w in tl.static_range(W):
                    total += weights[k * (W + 1) + w] * (here[REACH - w] if ahead else here[w])
                    more += (gained[k * (W + 1) + w] + own * (window[w] if ahead else window[REACH - w]),)
                more += (gained[k * (W + 1) + W] + own,)
            slopes, gained = slid, more
            inside = e < tl.where((t >= begin) & (t < end), E, 0)
            tl.store(gx + t * gx_row_stride + e, total.to(gx.dtype.element_ty), mask=inside)
    for i in tl.static_range(K * (W + 1)):
        store(gtaps + i * E + e, gained[i], in_e, EVEN_E)


@triton.jit
def gate_forward(
    y, z, out, batch, L, z_image_stride, z_row_stride, scale,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out of ROWS rows and BLOCK_E channels of an image."""
    P: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0)
    tiles = tl.cdiv(L, ROWS)
    e = ((program % P) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    t = ((program // P % tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    image = (program // P // tiles).to(tl.int64)
    inside = (t < L) & (e < E)
    gates = tl.load(z + image * z_image_stride + t * z_row_stride + e, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for k in tl.static_range(K):
        total += tl.load(y + (k * batch + image) * L * E + t * E + e, mask=inside, other=0.0).to(tl.float32)
    place = out + image * L * E + t * E + e
    tl.store(place, (scale * total * gates * sigmoid(gates)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(
    grad_out, y, z, gy, gz, batch, L, z_image_stride, z_row_stride, gz_image_stride, gz_row_stride, scale,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """gz, and gy [B, L, E], which is the same for every direction."""
    P: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0)
    tiles = tl.cdiv(L, ROWS)
    e = ((program % P) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    t = ((program // P % tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    image = (program // P // tiles).to(tl.int64)
    inside = (t < L) & (e < E)
    gates = tl.load(z + image * z_image_stride + t * z_row_stride + e, mask=inside, other=0.0).to(tl.float32)
    grad = scale * tl.load(grad_out + image * L * E + t * E + e, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for k in tl.static_range(K):
        total += tl.load(y + (k * batch + image) * L * E + t * E + e, mask=inside, other=0.0).to(tl.float32)
    part = sigmoid(gates)
    tl.store(gy + image * L * E + t * E + e, (grad * gates * part).to(gy.dtype.element_ty), mask=inside)
    slope = grad * total * part * (1.0 + gates * (1.0 - part))
    place = gz + image * gz_image_stride + t * gz_row_stride + e
    tl.store(place, slope.to(gz.dtype.element_ty), mask=inside)
