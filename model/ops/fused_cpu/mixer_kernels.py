"""What surrounds the scan in a Mamba mixer, as kernels for a CPU: causal convolution with SiLU, and the gate.

Legend: K directions, B batch, L length, E inner width, P: E rounded up to whole vectors, W taps. For each direction,
with s = 1, or −1 where it runs backwards:

    u_t = silu(bias + Σ_w taps_w x_{t − s (W − 1 − w)})
    out_t = silu(z_t) Σ_k y_{k,t} / 2 or undivided, by a factor

`taps` is packed as [K, W + 1, P], the bias last. A work item is some steps of an image, whose rows are read as they lie
in memory, and each item writes to places of its own.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from numba import carray, float32, float64, njit

from model.ops.fused_cpu.launch_arguments import CHUNK, CONV, CONV_BACKWARD, MIXER, TILE
from model.ops.fused_cpu.vector_math import fma, silu, silu_slope
from model.ops.fused_cpu.vectors import FLUSH, LANES, control, load, read, set_control, splat, store, take_one
from model.ops.fused_cpu.work_space import read_rows, write_row


@njit
def row(space, spare, source, start, stride, lanes, zero):
    """The vector at an element, 0 beyond the width; `spare` is a free row."""
    if lanes == LANES and stride == 1:
        return load(source, start, zero)
    read_rows(space, spare, source, start, 0, stride, 1, lanes, zero)
    return load(space, spare, zero)


@njit
def convolved(args, k, b, e, t, step, lanes, space, spare, zero):
    """The convolution at one step, before SiLU."""
    taps = k * (args.window + 1) * args.padded + e
    value = load(args.taps, taps + args.window * args.padded, zero)
    for w in range(args.window):
        at = t - step * (args.window - 1 - w)
        if at >= 0 and at < args.length:
            x = row(space, spare, args.x, b * args.x_b + at * args.x_l + e * args.x_e, args.x_e, lanes, zero)
            value = fma(load(args.taps, taps + w * args.padded, zero), x, value)
    return value


@njit
def conv_item(args, item, space, zero):
    """u of some steps of an image, in all directions."""
    tiles = (args.length + CHUNK - 1) // CHUNK
    b, first = item // tiles, item % tiles * CHUNK
    for t in range(first, min(first + CHUNK, args.length)):
        for k in range(args.directions):
            step = -1 if read(args.reverse, k, 0) != 0 else 1
            for e in range(0, args.width, LANES):
                lanes = min(LANES, args.width - e)
                value = silu(convolved(args, k, b, e, t, step, lanes, space, 0, zero))
                write_row(
                    args.u, ((k * args.batch + b) * args.length + t) * args.width + e, value, lanes, space, 0, zero
                )


@njit
def conv_backward_item(args, item, space, zero):
    """The gradients of x at some steps of an image, and these steps' part of those of taps and bias.

    The work space has a row of the whole width for each direction and step, and for the steps that a tap reaches.
    """
    tiles, reach = (args.length + TILE - 1) // TILE, args.window - 1
    b, first = item // tiles, item % tiles * TILE
    end = min(first + TILE, args.length)
    low, high = max(0, first - reach), min(args.length, end + reach)
    rows = TILE + 2 * reach
    spare = args.directions * rows * args.padded
    for k in range(args.directions):
        backwards = read(args.reverse, k, 0) != 0
        step = -1 if backwards else 1
        for t in range(low if backwards else first, end if backwards else high):
            for e in range(0, args.width, LANES):
                lanes = min(LANES, args.width - e)
                value = convolved(args, k, b, e, t, step, lanes, space, spare, zero)
                at = k * args.grad_u_k + b * args.grad_u_b + t * args.grad_u_l + e * args.grad_u_e
                grad = row(space, spare, args.grad_u, at, args.grad_u_e, lanes, zero) * silu_slope(value)
                store(space, (k * rows + t - low) * args.padded + e, grad)
        for e in range(0, args.width, LANES):
            target = (item * args.directions + k) * (args.window + 1) * args.padded + e
            grads = (k * rows - low) * args.padded + e
            tap_gradients(args, b, e, first, end, step, grads, target, space, spare, zero)
    for t in range(first, end):
        for e in range(0, args.width, LANES):
            value = splat(zero)
            for k in range(args.directions):
                step = -1 if read(args.reverse, k, 0) != 0 else 1
                taps = k * (args.window + 1) * args.padded + e
                for w in range(args.window):
                    at = t + step * (reach - w)
                    if at >= 0 and at < args.length:
                        grad = load(space, (k * rows + at - low) * args.padded + e, zero)
                        value = fma(load(args.taps, taps + w * args.padded, zero), grad, value)
            lanes = min(LANES, args.width - e)
            write_row(args.gx, (b * args.length + t) * args.width + e, value, lanes, space, spare, zero)


@njit
def tap_gradients(args, b, e, first, end, step, grads, target, space, spare, zero):
    """The sums over some steps for one vector of channels, of one direction."""
    lanes, bias = min(LANES, args.width - e), splat(zero)
    for t in range(first, end):
        bias = bias + load(space, grads + t * args.padded, zero)
    store(args.gtaps, target + args.window * args.padded, bias)
    for w in range(args.window):
        behind = step * (args.window - 1 - w)
        tap = splat(zero)
        for t in range(max(first, behind), min(end, args.length + behind)):
            at = b * args.x_b + (t - behind) * args.x_l + e * args.x_e
            x = row(space, spare, args.x, at, args.x_e, lanes, zero)
            tap = fma(load(space, grads + t * args.padded, zero), x, tap)
        store(args.gtaps, target + w * args.padded, tap)


@njit
def gate_item(args, item, space, zero):
    """out, or with `grad_out` the gradients of y (the same in all directions) and z, of some steps of an image."""
    factor = splat(read(args.factor, 0, zero))
    tiles = (args.length + CHUNK - 1) // CHUNK
    b, first = item // tiles, item % tiles * CHUNK
    for t in range(first, min(first + CHUNK, args.length)):
        for e in range(0, args.width, LANES):
            lanes = min(LANES, args.width - e)
            at = b * args.z_b + t * args.z_l + e * args.z_e
            z = row(space, 0, args.z, at, args.z_e, lanes, zero)
            total = splat(zero)
            for k in range(args.directions):
                at = k * args.y_k + b * args.y_b + t * args.y_l + e * args.y_e
                total = total + row(space, 0, args.y, at, args.y_e, lanes, zero)
            total = total * factor
            target = (b * args.length + t) * args.width + e
            if args.grad_out == 0:
                write_row(args.out, target, total * silu(z), lanes, space, 0, zero)
            else:
                at = b * args.grad_out_b + t * args.grad_out_l + e * args.grad_out_e
                grad = row(space, 0, args.grad_out, at, args.grad_out_e, lanes, zero)
                write_row(args.gy, target, grad * silu(z) * factor, lanes, space, 0, zero)
                write_row(args.gz, target, grad * total * silu_slope(z), lanes, space, 0, zero)


@njit
def items(pointer, zero):
    """Take items until none is left."""
    args = carray(pointer, 1, MIXER)[0]
    space = args.scratch + take_one(args.next_slot) * args.slot_bytes
    before = control(space)
    set_control(space, before | FLUSH)
    item = take_one(args.next_item)
    while item < args.items:
        if args.kind == CONV:
            conv_item(args, item, space, zero)
        elif args.kind == CONV_BACKWARD:
            conv_backward_item(args, item, space, zero)
        else:
            gate_item(args, item, space, zero)
        item = take_one(args.next_item)
    set_control(space, before)


# Each has a name of its own, as the cache goes by names.
def mixer_float32(pointer):
    items(pointer, float32(0))


def mixer_float64(pointer):
    items(pointer, float64(0))
