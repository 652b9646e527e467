"""A Mamba mixer between its two outer projections on a GPU: the kernels of `mixer_triton_kernels.py` and the scan.

Legend: K directions, B batch, L length, E inner width, N state size, R rank of the step size, W taps. xz [B, L, 2·E];
x, z, out [B, L, E]; u, y [K, B, L, E]; taps [K, W + 1, E], the bias last, in the order of each direction's time.

What a layer moves and saves for its backward pass bounds its speed, so `core` lets autograd do nothing by itself: the
gradients of x and z are written side by side into that of xz, that of u is summed where it lies, and one gradient
serves all directions' y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from model.ops.scan_operators import NAMESPACE

ROWS = 16  # of a program that needs no order of rows
SEGMENT = 128  # rows of a program of the convolution's backward pass
AHEAD = 4  # of which so many are loaded before any is used
BLOCK = 128  # channels
FUSION = {"enable_fp_fusion": True}  # of multiply and add, which Triton 3.10 leaves off unless asked


@torch.library.custom_op(f"{NAMESPACE}::conv_silu_triton", mutates_args=())
def conv_silu_op(x: torch.Tensor, taps: torch.Tensor, reverse: Sequence[int]) -> torch.Tensor:
    """silu of a causal convolution per direction: u in x's dtype."""
    from model.ops.mixer_triton_kernels import conv_forward

    x, taps = _rows(x), taps.contiguous()
    (batch, length, width), directions = x.shape, len(taps)
    u = x.new_empty(directions, *x.shape)
    if u.numel():
        with torch.cuda.device_of(x):
            conv_forward[(batch * math.ceil(length / ROWS) * math.ceil(width / BLOCK),)](
                x, taps, u, batch, length, *x.stride()[:2], **_sizes(width, directions), W=taps.shape[1] - 1,
                BACKWARDS=_bits(reverse), ROWS=ROWS, EVEN_E=not width % BLOCK, num_warps=4, **FUSION,
            )  # fmt: skip
    return u


@torch.library.custom_op(f"{NAMESPACE}::conv_silu_triton_backward", mutates_args=("gx",))
def conv_silu_backward_op(
    grad_u: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, reverse: Sequence[int], gx: torch.Tensor
) -> torch.Tensor:
    """Writes the gradient of x to gx, which is contiguous along the channels; returns that of the taps, float32."""
    from model.ops.mixer_triton_kernels import conv_backward

    x, taps, grad_u = _rows(x), taps.contiguous(), grad_u.contiguous()
    (batch, length, width), directions = x.shape, len(taps)
    segments = math.ceil(length / SEGMENT)
    gtaps = taps.new_zeros if not x.numel() else taps.new_empty
    shares = gtaps(batch * segments, *taps.shape, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            conv_backward[(batch * segments * math.ceil(width / BLOCK),)](
                grad_u, x, taps, gx, shares, batch, length, *x.stride()[:2], *gx.stride()[:2],
                **_sizes(width, directions), W=taps.shape[1] - 1, BACKWARDS=_bits(reverse), SEGMENT=SEGMENT,
                AHEAD=AHEAD, EVEN_E=not width % BLOCK, num_warps=1, **FUSION,
            )  # fmt: skip
    return shares.sum(0)


@torch.library.custom_op(f"{NAMESPACE}::gate_triton", mutates_args=())
def gate_op(y: torch.Tensor, z: torch.Tensor, scale: float) -> torch.Tensor:
    """The sum of all directions times `scale` times silu(z), in y's dtype."""
    from model.ops.mixer_triton_kernels import gate_forward

    y, z = y.contiguous(), _rows(z)
    (batch, length, width), directions = z.shape, len(y)
    out = torch.empty_like(y[0])
    if out.numel():
        with torch.cuda.device_of(y):
            gate_forward[(batch * math.ceil(length / ROWS) * math.ceil(width / BLOCK),)](
                y, z, out, batch, length, *z.stride()[:2], scale, **_sizes(width, directions), ROWS=ROWS, num_warps=4,
                **FUSION,
            )  # fmt: skip
    return out


@torch.library.custom_op(f"{NAMESPACE}::gate_triton_backward", mutates_args=("gz",))
def gate_backward_op(
    grad_out: torch.Tensor, y: torch.Tensor, z: torch.Tensor, scale: float, gz: torch.Tensor
) -> torch.Tensor:
    """Writes the gradient of z to gz, which is contiguous along the channels; returns that of each direction's y."""
    from model.ops.mixer_triton_kernels import gate_backward

    grad_out, y, z = grad_out.contiguous(), y.contiguous(), _rows(z)
    (batch, length, width), directions = z.shape, len(y)
    gy = torch.empty_like(y[0])
    if gy.numel():
        with torch.cuda.device_of(y):
            gate_backward[(batch * math.ceil(length / ROWS) * math.ceil(width / BLOCK),)](
                grad_out, y, z, gy, gz, batch, length, *z.stride()[:2], *gz.stride()[:2], scale,
                **_sizes(width, directions), ROWS=ROWS, num_warps=4, **FUSION,
            )  # fmt: skip
    return gy


@conv_silu_op.register_fake
def _(x: torch.Tensor, taps: torch.Tensor, reverse: Sequence[int]) -> torch.Tensor:
    return x.new_empty(len(taps), *x.shape)


@conv_silu_backward_op.register_fake
def _(grad_u: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, reverse: Any, gx: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(taps, dtype=torch.float32, memory_format=torch.contiguous_format)


@gate_op.register_fake
def _(y: torch.Tensor, z: torch.Tensor, scale: float) -> torch.Tensor:
    return y.new_empty(y.shape[1:])


@gate_backward_op.register_fake
def _(grad_out: torch.Tensor, y: torch.Tensor, z: torch.Tensor, scale: float, gz: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape[1:])


class ConvSilu(torch.autograd.Function):
    """u of x, taps and, for each direction, whether it is reversed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, taps: torch.Tensor, reverse: tuple[bool, ...]) -> torch.Tensor:
        ctx.save_for_backward(x, taps)
        ctx.reverse = [int(one) for one in reverse]
        return conv_silu_op(x, taps, ctx.reverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, taps = ctx.saved_tensors
        gx = x.new_empty(x.shape)
        gtaps = conv_silu_backward_op(grad_u, x, taps, ctx.reverse, gx)
        return gx, gtaps.to(taps.dtype), None


class Gate(torch.autograd.Function):
    """out of y, z and the factor."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, z: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(y, z)
        ctx.scale = scale
        return gate_op(y, z, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        y, z = ctx.saved_tensors
        gz = z.new_empty(z.shape)
        gy = gate_backward_op(grad_out, y, z, ctx.scale, gz)
        return gy.expand(y.shape), gz, None


class Core(torch.autograd.Function):
    """out of xz: convolution, step sizes, scan and gate.

    Besides xz: taps; the weights of all directions' x_proj [K, R + 2·N, E] and dt_proj [K, E, R], and the latter's
    biases [K, E]; A [K, E, N]; D [K, E]; for each direction whether it is reversed; the factor of the directions' sum.
    Products are in xz's dtype, as under autocast; a step size's bias is added in the scan, in float32, since its values
    near −5 would change by a few percent in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, xz: torch.Tensor, taps: torch.Tensor, x_proj: torch.Tensor, dt_proj: torch.Tensor,
        dt_bias: torch.Tensor, A: torch.Tensor, D: torch.Tensor, reverse: tuple[bool, ...], scale: float,
    ) -> torch.Tensor:  # fmt: skip
        backwards = [int(one) for one in reverse]
        x_proj_own, dt_proj_own = x_proj.to(xz.dtype), dt_proj.to(xz.dtype)
        x, z = xz.chunk(2, -1)
        u = conv_silu_op(x, taps, backwards)
        rates = torch.bmm(u.flatten(1, 2), x_proj_own.mT)  # [K, B · L, R + 2·N]
        step, b, c = _rates(rates, dt_proj.shape[-1], A.shape[-1])
        delta = torch.bmm(step, dt_proj_own.mT).view_as(u)
        keep = any(ctx.needs_input_grad)
        b, c = (part.unflatten(1, u.shape[1:3]) for part in (b, c))
        scan = torch.ops.token_labeling.scan_triton
        y, saved = scan(u, delta, A, b, c, D, dt_bias, True, backwards, keep)
        ctx.save_for_backward(xz, taps, x_proj, dt_proj, dt_bias, A, D, u, rates, delta, saved, y)
        ctx.backwards, ctx.scale = backwards, scale
        return gate_op(y, z, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        xz, taps, x_proj, dt_proj, dt_bias, A, D, u, rates, delta, saved, y = ctx.saved_tensors
        x_proj_own, dt_proj_own = x_proj.to(xz.dtype), dt_proj.to(xz.dtype)
        (x, z), gxz = xz.chunk(2, -1), torch.empty_like(xz, memory_format=torch.contiguous_format)
        gx, gz = gxz.chunk(2, -1)
        gy = gate_backward_op(grad_out, y, z, ctx.scale, gz)
        step, b, c = _rates(rates, dt_proj.shape[-1], A.shape[-1])
        b, c = (part.unflatten(1, u.shape[1:3]) for part in (b, c))
        scan = torch.ops.token_labeling.scan_triton_backward
        gu, gdelta, gA, gb, gc, gD, gbias = scan(
            gy.expand(u.shape), u, delta, A, b, c, D, dt_bias, saved, True, ctx.backwards
        )
        gdelta = gdelta.flatten(1, 2)
        gdt_proj = torch.bmm(gdelta.mT, step)
        grates = torch.cat([torch.bmm(gdelta, dt_proj_own), gb.flatten(1, 2), gc.flatten(1, 2)], -1)
        gx_proj = torch.bmm(grates.mT, u.flatten(1, 2))
        gu.flatten(1, 2).baddbmm_(grates, x_proj_own)
        gtaps = conv_silu_backward_op(gu, x, taps, ctx.backwards, gx)
        like = zip((gtaps, gx_proj, gdt_proj, gbias, gA, gD), (taps, x_proj, dt_proj, dt_bias, A, D), strict=True)
        return gxz, *(gradient.to(given.dtype) for gradient, given in like), None, None


def _rates(rates: torch.Tensor, rank: int, states: int) -> tuple[torch.Tensor, ...]:
    """The step's factors, B and C, [K, B · L, R or N] each, in what x_proj returns."""
    return rates.split([rank, states, states], -1)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bits(reverse: Sequence[int]) -> int:
    return sum(1 << k for k, backwards in enumerate(reverse) if backwards)


def _sizes(width: int, directions: int) -> dict[str, int]:
    return {"E": width, "K": directions, "BLOCK_E": BLOCK}
