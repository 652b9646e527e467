"""Triton kernels of the selective scan, all directions in one launch; `scan_triton.py` calls them.

Legend: K directions, B batch, L length, E inner width, N state size; P = ⌈E / BLOCK_E⌉ blocks of channels.
u, delta, y and their gradients [K, B, L, E]; A [K, E, N]; B, C [K, B, L, N]; D, bias [K, E];
saved [K, B, ⌈L / CHUNK⌉, E, N]. Steps are counted in running order; direction k, if bit k mod `period` of
`reverse_bits` is set, visits row L − 1 − step, so nothing is ever flipped.

One program owns a direction, an image and BLOCK_E channels, and walks through time with its states in float32
registers. Tiles are [BLOCK_N, BLOCK_E], channels last: the lanes of a warp then lie along the channels, so that rows
are read coalesced and y's sum over the states stays inside a thread; the other orientation needs shuffles for it at
every step. Exponentials are base 2, the only ones the hardware has; log2(e) is multiplied into A once.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + z) with z = exp(−|x|): no overflow, and exactly x above 20, as in torch.

    log(1 + z) would lose the digits of a small z, and small steps matter. It is 2·atanh(s) with s = z / (2 + z) ≤ 1/3;
    the first term of the series that is left out is below 2^-26 of the sum.
    """
    z = tl.exp2(-tl.abs(x) * LOG2_E)
    s = z / (2.0 + z)
    q = s * s
    series = 1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15 + q * (1.0 / 17)))
    series = 1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * series)))
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + q * series)


@triton.jit
def sigmoid(x):
    """The derivative of softplus; the exponent is never positive, so that both ends stay precise."""
    z = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.where(x >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def per_channel(pointer, k, E, e):
    """[BLOCK_E] of a [K, E] tensor, or zeros if there is none."""
    if pointer is None:
        return tl.zeros(e.shape, tl.float32)
    return tl.load(pointer + k * E + e, mask=e < E, other=0.0).to(tl.float32)


@triton.jit
def scan_forward(
    u, delta, A, B, C, D, bias, y, saved,
    batch, L, E, N, P, reverse_bits, period,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y, and the state before each chunk of CHUNK steps."""
    program = tl.program_id(0)
    k = program // P // batch
    e = (program % P) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e = e < E
    in_n = n < N
    in_tile = in_n[:, None] & in_e[None, :]
    tile = e[None, :] * N + n[:, None]
    runs_back = (reverse_bits >> (k % period)) & 1
    first = runs_back * (L - 1)
    stride = 1 - 2 * runs_back
    kb = (program // P).to(tl.int64)  # 64 bits up to here: large batches pass 2^31 elements, one image does not
    u += kb * L * E
    delta += kb * L * E
    y += kb * L * E
    B += kb * L * N
    C += kb * L * N
    chunks = tl.cdiv(L, CHUNK)
    saved += kb * chunks * E * N

    a_log2 = tl.load(A + k * E * N + tile, mask=in_tile, other=0.0).to(tl.float32) * LOG2_E
    skip = per_channel(D, k, E, e)
    shift = per_channel(bias, k, E, e)
    h = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for chunk in range(chunks):
        tl.store(saved + chunk * E * N + tile, h, mask=in_tile)
        for step in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, L)):
            row = first + step * stride
            x = tl.load(u + row * E + e, mask=in_e, other=0.0).to(tl.float32)
            raw = tl.load(delta + row * E + e, mask=in_e, other=0.0).to(tl.float32) + shift
            b = tl.load(B + row * N + n, mask=in_n, other=0.0).to(tl.float32)
            c = tl.load(C + row * N + n, mask=in_n, other=0.0).to(tl.float32)
            dt = softplus(raw) if SOFTPLUS else raw
            h = tl.exp2(dt[None, :] * a_log2) * h + b[:, None] * (dt * x)[None, :]
            tl.store(y + row * E + e, tl.sum(c[:, None] * h, 0) + skip * x, mask=in_e)


@triton.jit
def scan_backward(
    grad_y, u, delta, A, B, C, D, bias, saved, gu, gdelta, gA, gB, gC, gD, gbias,
    batch, L, E, N, P, reverse_bits, period,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients; gA [K, B, E, N], gD, gbias [K, B, E] and gB, gC [K, B, P, L, N] are the program's own shares.

    A chunk is walked back in parts of PART steps, whose states and decays stay in registers: 2·PART + 4 values per
    state and no scratch memory. Each part starts anew from the chunk's saved state, which repeats (CHUNK / PART − 1)/2
    updates per step: with CHUNK 16 and PART 4 a step costs 2.5 exponentials per state. PART 8 would cost 1.5, but asks
    for more registers than a thread has.
    """
    program = tl.program_id(0)
    k = program // P // batch
    block = program % P
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e = e < E
    in_n = n < N
    in_tile = in_n[:, None] & in_e[None, :]
    tile = e[None, :] * N + n[:, None]
    runs_back = (reverse_bits >> (k % period)) & 1
    first = runs_back * (L - 1)
    stride = 1 - 2 * runs_back
    kb = (program // P).to(tl.int64)  # 64 bits up to here: large batches pass 2^31 elements, one image does not
    grad_y += kb * L * E
    u += kb * L * E
    delta += kb * L * E
    gu += kb * L * E
    gdelta += kb * L * E
    B += kb * L * N
    C += kb * L * N
    gB += (kb * P + block) * L * N
    gC += (kb * P + block) * L * N
    chunks = tl.cdiv(L, CHUNK)
    saved += kb * chunks * E * N

    a_log2 = tl.load(A + k * E * N + tile, mask=in_tile, other=0.0).to(tl.float32) * LOG2_E
    skip = per_channel(D, k, E, e)
    shift = per_channel(bias, k, E, e)
    gh = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)  # gradient of the state from later steps
    ga = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    gskip = tl.zeros([BLOCK_E], tl.float32)
    gshift = tl.zeros([BLOCK_E], tl.float32)
    parts = tl.cdiv(L, PART)
    for back in range(parts):
        start = (parts - 1 - back) * PART
        chunk = start // CHUNK
        h = tl.load(saved + chunk * E * N + tile, mask=in_tile, other=0.0)
        for step in range(chunk * CHUNK, start):
            row = first + step * stride
            x = tl.load(u + row * E + e, mask=in_e, other=0.0).to(tl.float32)
            raw = tl.load(delta + row * E + e, mask=in_e, other=0.0).to(tl.float32) + shift
            b = tl.load(B + row * N + n, mask=in_n, other=0.0).to(tl.float32)
            dt = softplus(raw) if SOFTPLUS else raw
            h = tl.exp2(dt[None, :] * a_log2) * h + b[:, None] * (dt * x)[None, :]

        states = ()  # before each step
        decays = ()
        raws = ()
        dts = ()
        for i in tl.static_range(PART):
            # Beyond L the last row is read again; the states after it are not used.
            row = first + min(start + i, L - 1) * stride
            x = tl.load(u + row * E + e, mask=in_e, other=0.0).to(tl.float32)
            raw = tl.load(delta + row * E + e, mask=in_e, other=0.0).to(tl.float32) + shift
            b = tl.load(B + row * N + n, mask=in_n, other=0.0).to(tl.float32)
            dt = softplus(raw) if SOFTPLUS else raw
            decay = tl.exp2(dt[None, :] * a_log2)
            states += (h,)
            decays += (decay,)
            raws += (raw,)
            dts += (dt,)
            h = decay * h + b[:, None] * (dt * x)[None, :]

        for i in tl.static_range(PART - 1, -1, -1):
            # Beyond L only zeros are read and nothing is written: those gradients are zero.
            exists = start + i < L
            row = first + min(start + i, L - 1) * stride
            to_e = e < tl.where(exists, E, 0)
            to_n = n < tl.where(exists, N, 0)
            x = tl.load(u + row * E + e, mask=to_e, other=0.0).to(tl.float32)
            gy = tl.load(grad_y + row * E + e, mask=to_e, other=0.0).to(tl.float32)
            b = tl.load(B + row * N + n, mask=in_n, other=0.0).to(tl.float32)
            c = tl.load(C + row * N + n, mask=in_n, other=0.0).to(tl.float32)

            tl.store(gC + row * N + n, tl.sum(gy[None, :] * h, 1), mask=to_n)
            gh += c[:, None] * gy[None, :]
            tl.store(gB + row * N + n, tl.sum((dts[i] * x)[None, :] * gh, 1), mask=to_n)
            gx = tl.sum(b[:, None] * gh, 0)
            gh *= decays[i]  # from here on the gradient of the state before this step
            kept = gh * states[i]
            ga += dts[i][None, :] * kept
            graw = gx * x + LN2 * tl.sum(a_log2 * kept, 0)
            if SOFTPLUS:
                graw *= sigmoid(raws[i])
            tl.store(gu + row * E + e, gx * dts[i] + skip * gy, mask=to_e)
            tl.store(gdelta + row * E + e, graw, mask=to_e)
            gskip += gy * x
            gshift += graw
            h = states[i]
    tl.store(gA + kb * E * N + tile, ga, mask=in_tile)
    if gD is not None:
        tl.store(gD + kb * E + e, gskip, mask=in_e)
    if gbias is not None:
        tl.store(gbias + kb * E + e, gshift, mask=in_e)
