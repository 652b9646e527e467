"""Triton kernels of the selective scan, all directions in one launch; `scan_triton.py` calls them.

Legend: K directions, B batch, L length, E inner width, N state size; P = ⌈E / BLOCK_E⌉ blocks of channels.
u, delta, y and their gradients [K, B, L, E]; A [K, N, E]; B, C [K, B, L, N]; D, bias [K, E];
saved [K, B, ⌈L / CHUNK⌉, N, E]. Steps are counted in running order; direction k, if bit k mod `period` of
`reverse_bits` is set, visits row L − 1 − step, so nothing is ever flipped.

One program is one warp. It owns a direction, an image and BLOCK_E channels, and walks through time with its states in
float32 registers. Tiles are [BLOCK_N, BLOCK_E] with channels last, in memory too: from the loads of A and `saved` the
compiler takes where the values of a tile lie, and so the lanes of a warp lie along the channels: all of them in the
forward kernel, where a sum over the states then stays inside a thread; eight of them in the backward one, which also
sums over the channels. What several steps need is loaded before any of it is used, as loads take longer than a step.
Exponentials are base 2, the only ones the hardware has; log2(e) is multiplied into A once.
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

    log(1 + z) would lose the digits of a small z, and small steps matter. Hence z times a polynomial: log(1 + z) / z at
    the Chebyshev points of [0, 1], wrong by 5e-9, so that float32 rounds more.
    """
    z = tl.exp2(-tl.abs(x) * LOG2_E)
    q = 0.10543623566 + z * (-0.05637361482 + z * (0.01954252833 + z * -0.00317605701))
    q = 0.33329710364 + z * (-0.24951615930 + z * (0.19663274288 + z * (-0.15269666910 + z * q)))
    return tl.maximum(x, 0.0) + z * (1.0 + z * (-0.49999892712 + z * q))


@triton.jit
def sigmoid(x):
    """The derivative of softplus; the exponent is never positive, so that both ends stay precise."""
    z = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.where(x >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def load(pointer, mask, EVEN: tl.constexpr):
    """Zeros where the mask is not set; no mask at all where the blocks divide the sizes."""
    return tl.load(pointer) if EVEN else tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def store(pointer, values, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointer, values)
    else:
        tl.store(pointer, values, mask=mask)


@triton.jit
def per_channel(pointer, k, e, E: tl.constexpr, EVEN: tl.constexpr):
    """[BLOCK_E] of a [K, E] tensor, or zeros if there is none."""
    # Known when compiling; not `if …: return`, behind which Triton would go on.
    return tl.zeros(e.shape, tl.float32) if pointer is None else load(pointer + k * E + e, e < E, EVEN).to(tl.float32)


@triton.jit
def forward_steps(
    h, u, delta, B, C, y, first, stride, start, e, n, a_log2, skip, shift,
    E: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr, STEPS: tl.constexpr, EVEN_E: tl.constexpr,
    EVEN_N: tl.constexpr,
):  # fmt: skip
    """The state after STEPS steps from `start`; and their rows of y, if that is wanted."""
    xs, raws, bs, cs = (), (), (), ()
    for i in tl.static_range(STEPS):
        row = first + (start + i) * stride
        xs += (load(u + row * E + e, e < E, EVEN_E),)
        raws += (load(delta + row * E + e, e < E, EVEN_E),)
        bs += (load(B + row * N + n, n < N, EVEN_N),)
        if y is not None:
            cs += (load(C + row * N + n, n < N, EVEN_N),)
    for i in tl.static_range(STEPS):
        row = first + (start + i) * stride
        x = xs[i].to(tl.float32)
        raw = raws[i].to(tl.float32) + shift
        dt = softplus(raw) if SOFTPLUS else raw
        h = tl.exp2(dt[None, :] * a_log2) * h + bs[i].to(tl.float32)[:, None] * (dt * x)[None, :]
        if y is not None:
            out = tl.sum(cs[i].to(tl.float32)[:, None] * h, 0) + skip * x
            store(y + row * E + e, out.to(y.dtype.element_ty), e < E, EVEN_E)
    return h


@triton.jit
def scan_forward(
    u, delta, A, B, C, D, bias, y, saved,
    batch, L, reverse_bits, period, E: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_E: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """y, and for the backward pass, if wanted, the state before each chunk of CHUNK steps."""
    program = tl.program_id(0)
    k = program // P // batch
    e = (program % P) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    EVEN: tl.constexpr = EVEN_E and EVEN_N
    in_tile = (n < N)[:, None] & (e < E)[None, :]
    tile = n[:, None] * E + e[None, :]
    runs_back = (reverse_bits >> (k % period)) & 1
    first = runs_back * (L - 1)
    stride = 1 - 2 * runs_back
    kb = (program // P).to(tl.int64)  # 64 bits up to here: large batches pass 2^31 elements, one image does not
    u += kb * L * E
    delta += kb * L * E
    y += kb * L * E
    B += kb * L * N
    C += kb * L * N
    if saved is not None:
        saved += kb * tl.cdiv(L, CHUNK) * E * N

    a_log2 = load(A + k * E * N + tile, in_tile, EVEN).to(tl.float32) * LOG2_E
    skip = per_channel(D, k, e, E, EVEN_E)
    shift = per_channel(bias, k, e, E, EVEN_E)
    h = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    whole = L // STEPS * STEPS
    for start in range(0, whole, STEPS):
        if saved is not None and start % CHUNK == 0:
            store(saved + start // CHUNK * E * N + tile, h, in_tile, EVEN)
        h = forward_steps(
            h, u, delta, B, C, y, first, stride, start, e, n, a_log2, skip, shift,
            E, N, SOFTPLUS, STEPS, EVEN_E, EVEN_N,
        )  # fmt: skip
    for step in range(whole, L):
        if saved is not None and step % CHUNK == 0:
            store(saved + step // CHUNK * E * N + tile, h, in_tile, EVEN)
        h = forward_steps(
            h, u, delta, B, C, y, first, stride, step, e, n, a_log2, skip, shift,
            E, N, SOFTPLUS, 1, EVEN_E, EVEN_N,
        )  # fmt: skip


@triton.jit
def backward_steps(
    gh, ga, gskip, gshift, h, grad_y, u, delta, B, C, gu, gdelta, gB, gC, first, stride, start, e, n,
    a_log2, skip, shift, E: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr, STEPS: tl.constexpr,
    EVEN_E: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """STEPS steps from `start`, last first: gh before them, and what A, D and the bias gained; h: the state before."""
    xs, raws, bs, cs, gys = (), (), (), (), ()
    for i in tl.static_range(STEPS):
        row = first + (start + i) * stride
        xs += (load(u + row * E + e, e < E, EVEN_E),)
        raws += (load(delta + row * E + e, e < E, EVEN_E),)
        bs += (load(B + row * N + n, n < N, EVEN_N),)
        cs += (load(C + row * N + n, n < N, EVEN_N),)
        gys += (load(grad_y + row * E + e, e < E, EVEN_E),)
    states, decays, dts, shifted = (), (), (), ()
    for i in tl.static_range(STEPS):
        raw = raws[i].to(tl.float32) + shift
        dt = softplus(raw) if SOFTPLUS else raw
        decay = tl.exp2(dt[None, :] * a_log2)
        states += (h,)  # before each step
        decays += (decay,)
        dts += (dt,)
        shifted += (raw,)
        h = decay * h + bs[i].to(tl.float32)[:, None] * (dt * xs[i].to(tl.float32))[None, :]
    for i in tl.static_range(STEPS - 1, -1, -1):
        row = first + (start + i) * stride
        x, gy = xs[i].to(tl.float32), gys[i].to(tl.float32)
        store(gC + row * N + n, tl.sum(gy[None, :] * h, 1).to(gC.dtype.element_ty), n < N, EVEN_N)
        gh += cs[i].to(tl.float32)[:, None] * gy[None, :]
        store(gB + row * N + n, tl.sum((dts[i] * x)[None, :] * gh, 1).to(gB.dtype.element_ty), n < N, EVEN_N)
        gx = tl.sum(bs[i].to(tl.float32)[:, None] * gh, 0)
        gh *= decays[i]  # from here on the gradient of the state before this step
        kept = gh * states[i]
        ga += dts[i][None, :] * kept
        graw = gx * x + LN2 * tl.sum(a_log2 * kept, 0)
        if SOFTPLUS:
            graw *= sigmoid(shifted[i])
        store(gu + row * E + e, (gx * dts[i] + skip * gy).to(gu.dtype.element_ty), e < E, EVEN_E)
        store(gdelta + row * E + e, graw.to(gdelta.dtype.element_ty), e < E, EVEN_E)
        gskip += gy * x
        gshift += graw
        h = states[i]
    return gh, ga, gskip, gshift


@triton.jit
def scan_backward(
    grad_y, u, delta, A, B, C, D, bias, saved, gu, gdelta, gA, gB, gC, gD, gbias,
    batch, L, reverse_bits, period, E: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_E: tl.constexpr, EVEN_N: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """All gradients; gA [K, B, N, E], gD, gbias [K, B, E] and gB, gC [K, B, P, L, N] are the program's own shares.

    With SHARED all directions have one grad_y [B, L, E]. A chunk is walked back in parts of STEPS steps, whose states
    and decays stay in registers: 2·STEPS + 4 values per state and no scratch memory. Each part starts anew from the
    chunk's saved state, which repeats (CHUNK / STEPS − 1)/2 updates per step.
    """
    program = tl.program_id(0)
    k = program // P // batch
    block = program % P
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    EVEN: tl.constexpr = EVEN_E and EVEN_N
    in_tile = (n < N)[:, None] & (e < E)[None, :]
    tile = n[:, None] * E + e[None, :]
    runs_back = (reverse_bits >> (k % period)) & 1
    first = runs_back * (L - 1)
    stride = 1 - 2 * runs_back
    kb = (program // P).to(tl.int64)  # 64 bits up to here: large batches pass 2^31 elements, one image does not
    grad_y += (kb - k * batch if SHARED else kb) * L * E
    u += kb * L * E
    delta += kb * L * E
    gu += kb * L * E
    gdelta += kb * L * E
    B += kb * L * N
    C += kb * L * N
    gB += (kb * P + block) * L * N
    gC += (kb * P + block) * L * N
    saved += kb * tl.cdiv(L, CHUNK) * E * N

    a_log2 = load(A + k * E * N + tile, in_tile, EVEN).to(tl.float32) * LOG2_E
    skip = per_channel(D, k, e, E, EVEN_E)
    shift = per_channel(bias, k, e, E, EVEN_E)
    gh = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)  # gradient of the state from later steps
    ga = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    gskip = tl.zeros([BLOCK_E], tl.float32)
    gshift = tl.zeros([BLOCK_E], tl.float32)
    whole = L // STEPS * STEPS
    for back in range(whole, L):
        last = L - 1 - (back - whole)
        chunk = last // CHUNK
        h = load(saved + chunk * E * N + tile, in_tile, EVEN)
        for step in range(chunk * CHUNK, last):
            h = forward_steps(
                h, u, delta, B, C, None, first, stride, step, e, n, a_log2, skip, shift,
                E, N, SOFTPLUS, 1, EVEN_E, EVEN_N,
            )  # fmt: skip
        gh, ga, gskip, gshift = backward_steps(
            gh, ga, gskip, gshift, h, grad_y, u, delta, B, C, gu, gdelta, gB, gC, first, stride, last, e, n,
            a_log2, skip, shift, E, N, SOFTPLUS, 1, EVEN_E, EVEN_N,
        )  # fmt: skip
    for back in range(0, whole, STEPS):
        start = whole - STEPS - back
        chunk = start // CHUNK
        h = load(saved + chunk * E * N + tile, in_tile, EVEN)
        for step in range(chunk * CHUNK, start, STEPS):
            h = forward_steps(
                h, u, delta, B, C, None, first, stride, step, e, n, a_log2, skip, shift,
                E, N, SOFTPLUS, STEPS, EVEN_E, EVEN_N,
            )  # fmt: skip
        gh, ga, gskip, gshift = backward_steps(
            gh, ga, gskip, gshift, h, grad_y, u, delta, B, C, gu, gdelta, gB, gC, first, stride, start, e, n,
            a_log2, skip, shift, E, N, SOFTPLUS, STEPS, EVEN_E, EVEN_N,
        )  # fmt: skip
    store(gA + kb * E * N + tile, ga, in_tile, EVEN)
    if gD is not None:
        store(gD + kb * E + e, gskip, e < E, EVEN_E)
    if gbias is not None:
        store(gbias + kb * E + e, gshift, e < E, EVEN_E)
