"""The selective scan's kernels for a CPU, compiled by Numba at their first use.

Legend: K directions, B batch, L length, E inner width, N state size. For each direction, in its order of time:

    dt = delta + delta_bias, or softplus of it
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    y_t = C_t · h_t + D u_t

A work item is a few channels of one image and direction. Threads take items until none is left, and each item writes to
places of its own, so that results do not depend on who took what. Inputs are read with the strides that they have.
All values of a chunk of steps stay in the first cache. Backward, the states of a chunk are computed again from the one
saved before it, for one state number n after the other.

Work space is addressed by the index of an element in `space`; a row is one vector of channels.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from numba import carray, float32, float64, njit

from model.ops.fused_cpu.launch_arguments import CHUNK, GROUP, SCAN
from model.ops.fused_cpu.vector_math import exp2, fma, softplus, softplus_slope, times_log2e
from model.ops.fused_cpu.vectors import (
    FLUSH,
    LANES,
    control,
    fold,
    load,
    read,
    set_control,
    splat,
    store,
    take_one,
    total,
    write,
)
from model.ops.fused_cpu.work_space import read_rows, write_row

BLOCKS = GROUP // LANES  # vectors of a group
HALF = LANES // 2
TILE = CHUNK * LANES  # a row for each step of a chunk


@njit
def read_steps(args, k, b, e, first, step, count, lanes, space, tiles, zero):
    """u, then delta + bias, of `count` steps from `first`, a tile each."""
    at = k * args.u_k + b * args.u_b + first * args.u_l + e * args.u_e
    read_rows(space, tiles, args.u, at, step * args.u_l, args.u_e, count, lanes, zero)
    at = k * args.delta_k + b * args.delta_b + first * args.delta_l + e * args.delta_e
    raw, bias = tiles + TILE, tiles + 2 * TILE
    read_rows(space, raw, args.delta, at, step * args.delta_l, args.delta_e, count, lanes, zero)
    if args.bias != 0:
        read_rows(space, bias, args.bias, k * args.bias_k + e * args.bias_e, 0, args.bias_e, 1, lanes, zero)
        for i in range(count):
            store(space, raw + i * LANES, load(space, raw + i * LANES, zero) + load(space, bias, zero))


@njit
def forward_item(args, item, space, zero):
    """y, and the state before each chunk, of one vector of channels."""
    blocks = (args.width + LANES - 1) // LANES
    k, b, e = item // blocks // args.batch, item // blocks % args.batch, item % blocks * LANES
    lanes, length, states = min(LANES, args.width - e), args.length, args.states
    all_b, all_c, b_n, c_n = args.B, args.C, args.B_n, args.C_n  # the compiler cannot know that no store changes them
    backwards = read(args.reverse, k, 0) != 0
    step = -1 if backwards else 1
    a, h, skip = 0, states * LANES, 2 * states * LANES
    tiles = skip + 2 * LANES
    for n in range(states):
        read_rows(space, a + n * LANES, args.A, k * args.A_k + e * args.A_e + n * args.A_n, 0, args.A_e, 1, lanes, zero)
        store(space, a + n * LANES, times_log2e(load(space, a + n * LANES, zero)))
        store(space, h + n * LANES, splat(zero))
    if args.D != 0:
        read_rows(space, skip, args.D, k * args.D_k + e * args.D_e, 0, args.D_e, 1, lanes, zero)
    for chunk in range((length + CHUNK - 1) // CHUNK):
        count = min(CHUNK, length - chunk * CHUNK)
        first = length - 1 - chunk * CHUNK if backwards else chunk * CHUNK
        read_steps(args, k, b, e, first, step, count, lanes, space, tiles, zero)
        if args.saved != 0:
            chunks = (length + CHUNK - 1) // CHUNK
            kept = (((k * args.batch + b) * chunks + chunk) * states) * args.padded + e
            for n in range(states):
                store(args.saved, kept + n * args.padded, load(space, h + n * LANES, zero))
        for i in range(count):
            t = first + i * step
            u, dt = load(space, tiles + i * LANES, zero), load(space, tiles + TILE + i * LANES, zero)
            if args.softplus != 0:
                dt = softplus(dt)
            dtu = dt * u
            y = load(space, skip, zero) * u if args.D != 0 else splat(zero)
            at_b = k * args.B_k + b * args.B_b + t * args.B_l
            at_c = k * args.C_k + b * args.C_b + t * args.C_l
            for n in range(states):
                new = dtu * splat(read(all_b, at_b + n * b_n, zero))
                new = fma(exp2(dt * load(space, a + n * LANES, zero)), load(space, h + n * LANES, zero), new)
                store(space, h + n * LANES, new)
                y = fma(new, splat(read(all_c, at_c + n * c_n, zero)), y)
            target = ((k * args.batch + b) * length + t) * args.width + e
            write_row(args.y, target, y, lanes, space, skip + LANES, zero)


@njit
def backward_item(args, item, space, zero):
    """All gradients of a group of channels, from the last chunk to the first."""
    groups = (args.width + GROUP - 1) // GROUP
    k, b, group = item // groups // args.batch, item // groups % args.batch, item % groups
    length, states, image = args.length, args.states, k * args.batch + b
    blocks = min(BLOCKS, (args.width - group * GROUP + LANES - 1) // LANES)
    backwards = read(args.reverse, k, 0) != 0
    step, chunks, rows = -1 if backwards else 1, (length + CHUNK - 1) // CHUNK, states * LANES
    a, carry, ga = 0, blocks * rows, 2 * blocks * rows
    skip, gskip, gbias = 3 * blocks * rows, 3 * blocks * rows + blocks * LANES, 3 * blocks * rows + 2 * blocks * LANES
    sums = gbias + blocks * LANES  # of h gy, then of g dt u: half a row for each step and state
    tiles = sums + 2 * CHUNK * states * HALF
    for j in range(blocks):
        e = group * GROUP + j * LANES
        lanes = min(LANES, args.width - e)
        for n in range(states):
            row = j * rows + n * LANES
            at = k * args.A_k + e * args.A_e + n * args.A_n
            read_rows(space, a + row, args.A, at, 0, args.A_e, 1, lanes, zero)
            store(space, carry + row, splat(zero))
            store(space, ga + row, splat(zero))
        if args.D != 0:
            read_rows(space, skip + j * LANES, args.D, k * args.D_k + e * args.D_e, 0, args.D_e, 1, lanes, zero)
        store(space, gskip + j * LANES, splat(zero))
        store(space, gbias + j * LANES, splat(zero))
    for chunk in range(chunks - 1, -1, -1):
        count = min(CHUNK, length - chunk * CHUNK)
        first = length - 1 - chunk * CHUNK if backwards else chunk * CHUNK
        for j in range(blocks):
            e = group * GROUP + j * LANES
            before = ((image * chunks + chunk) * states) * args.padded + e
            backward_chunk(
                args, k, b, e, first, step, count, before, j == 0, space,
                a + j * rows, carry + j * rows, ga + j * rows, skip + j * LANES, gskip + j * LANES, gbias + j * LANES,
                sums, tiles, zero,
            )  # fmt: skip
        for i in range(count):
            target = ((image * groups + group) * length + first + i * step) * states
            for n in range(states):
                at = sums + (i * states + n) * HALF
                write(args.gC, target + n, total(load(space, at, fold(splat(zero)))))
                at += CHUNK * states * HALF
                write(args.gB, target + n, total(load(space, at, fold(splat(zero)))))
    for j in range(blocks):
        e = group * GROUP + j * LANES
        for n in range(states):
            store(args.gA, (image * states + n) * args.padded + e, load(space, ga + j * rows + n * LANES, zero))
        store(args.gD, image * args.padded + e, load(space, gskip + j * LANES, zero))
        store(args.gbias, image * args.padded + e, load(space, gbias + j * LANES, zero))


@njit
def backward_chunk(
    args, k, b, e, first, step, count, before, fresh, space, a, carry, ga, skip, gskip, gbias, sums, tiles, zero
):
    """The gradients of a chunk of steps for one vector of channels; all but the first eight are places."""
    lanes = min(LANES, args.width - e)
    raw, gy, dt, dtu = tiles + TILE, tiles + 2 * TILE, tiles + 3 * TILE, tiles + 4 * TILE
    gdt, gdtu, decays, states_before = tiles + 5 * TILE, tiles + 6 * TILE, tiles + 7 * TILE, tiles + 8 * TILE
    read_steps(args, k, b, e, first, step, count, lanes, space, tiles, zero)
    at = k * args.grad_y_k + b * args.grad_y_b + first * args.grad_y_l + e * args.grad_y_e
    read_rows(space, gy, args.grad_y, at, step * args.grad_y_l, args.grad_y_e, count, lanes, zero)
    for i in range(count):
        x = load(space, raw + i * LANES, zero)
        if args.softplus != 0:
            x = softplus(x)
        store(space, dt + i * LANES, x)
        store(space, dtu + i * LANES, x * load(space, tiles + i * LANES, zero))
        store(space, gdt + i * LANES, splat(zero))
        store(space, gdtu + i * LANES, splat(zero))
    all_b, at_b, b_n, b_l = args.B, k * args.B_k + b * args.B_b + first * args.B_l, args.B_n, step * args.B_l
    all_c, at_c, c_n, c_l = args.C, k * args.C_k + b * args.C_b + first * args.C_l, args.C_n, step * args.C_l
    half, states = fold(splat(zero)), args.states
    for n in range(states):
        rate = load(space, a + n * LANES, zero)
        power = times_log2e(rate)
        h = load(args.saved, before + n * args.padded, zero)
        for i in range(count):
            decay = exp2(load(space, dt + i * LANES, zero) * power)
            store(space, decays + i * LANES, decay)
            store(space, states_before + i * LANES, h)
            new = load(space, dtu + i * LANES, zero) * splat(read(all_b, at_b + i * b_l + n * b_n, zero))
            h = fma(decay, h, new)
            found = fold(h * load(space, gy + i * LANES, zero))
            place = sums + (i * states + n) * HALF
            store(space, place, found if fresh else load(space, place, half) + found)
        later, grad_a = load(space, carry + n * LANES, zero), load(space, ga + n * LANES, zero)
        for i in range(count - 1, -1, -1):
            c = splat(read(all_c, at_c + i * c_l + n * c_n, zero))
            g = fma(c, load(space, gy + i * LANES, zero), later)
            found = fold(g * load(space, dtu + i * LANES, zero))
            place = sums + ((CHUNK + i) * states + n) * HALF
            store(space, place, found if fresh else load(space, place, half) + found)
            b_now = splat(read(all_b, at_b + i * b_l + n * b_n, zero))
            store(space, gdtu + i * LANES, fma(g, b_now, load(space, gdtu + i * LANES, zero)))
            later = load(space, decays + i * LANES, zero) * g
            exponent = later * load(space, states_before + i * LANES, zero)  # the gradient of dt A
            grad_a = fma(exponent, load(space, dt + i * LANES, zero), grad_a)
            store(space, gdt + i * LANES, fma(exponent, rate, load(space, gdt + i * LANES, zero)))
        store(space, carry + n * LANES, later)
        store(space, ga + n * LANES, grad_a)
    grad_skip, grad_bias = load(space, gskip, zero), load(space, gbias, zero)
    spare = tiles + 9 * TILE
    for i in range(count):
        u, gy_now = load(space, tiles + i * LANES, zero), load(space, gy + i * LANES, zero)
        grad = load(space, gdtu + i * LANES, zero)
        grad_dt = fma(grad, u, load(space, gdt + i * LANES, zero))
        if args.softplus != 0:
            grad_dt = grad_dt * softplus_slope(load(space, raw + i * LANES, zero))
        grad_u = grad * load(space, dt + i * LANES, zero)
        if args.D != 0:
            grad_u = fma(gy_now, load(space, skip, zero), grad_u)
        target = ((k * args.batch + b) * args.length + first + i * step) * args.width + e
        write_row(args.gu, target, grad_u, lanes, space, spare, zero)
        write_row(args.gdelta, target, grad_dt, lanes, space, spare, zero)
        grad_skip, grad_bias = fma(gy_now, u, grad_skip), grad_bias + grad_dt
    store(space, gskip, grad_skip)
    store(space, gbias, grad_bias)


@njit
def forward_items(pointer, zero):
    """Take items until none is left."""
    args = carray(pointer, 1, SCAN)[0]
    space = args.scratch + take_one(args.next_slot) * args.slot_bytes
    before = control(space)
    set_control(space, before | FLUSH)
    item = take_one(args.next_item)
    while item < args.items:
        forward_item(args, item, space, zero)
        item = take_one(args.next_item)
    set_control(space, before)


@njit
def backward_items(pointer, zero):
    """Take items until none is left."""
    args = carray(pointer, 1, SCAN)[0]
    space = args.scratch + take_one(args.next_slot) * args.slot_bytes
    before = control(space)
    set_control(space, before | FLUSH)
    item = take_one(args.next_item)
    while item < args.items:
        backward_item(args, item, space, zero)
        item = take_one(args.next_item)
    set_control(space, before)


# Each has a name of its own, as the cache goes by names.
def forward_float32(pointer):
    forward_items(pointer, float32(0))


def forward_float64(pointer):
    forward_items(pointer, float64(0))


def backward_float32(pointer):
    backward_items(pointer, float32(0))


def backward_float64(pointer):
    backward_items(pointer, float64(0))
