"""What surrounds the scan in a Mamba mixer, fused on a CPU: causal convolution with SiLU, and the gate.

Legend: K directions, B batch, L length, E inner width, W taps, P: E rounded up to whole vectors.
x, z, out [B, L, E]; u, y [K, B, L, E]; taps [K, W + 1, P], the bias last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from labeler.base.errors import ModelError
from model.ops.fused_cpu.launch_arguments import (
    CHUNK,
    CONV,
    CONV_BACKWARD,
    GATE,
    MIXER,
    MIXER_STRIDED,
    TILE,
    padded_width,
)
from model.ops.fused_cpu.machine import kernel


def conv_silu(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], reverse: tuple[bool, ...]
) -> torch.Tensor:
    """silu of a causal convolution per direction, in float32 or wider; the result has x's dtype.

    Args:
        x: [B, L, E] with any strides.
        weights: [E, 1, W] of each direction; the last tap belongs to the step itself.
        biases: [E] of each direction.
        reverse: for each direction, whether it runs from the last step to the first.

    Returns:
        [K, B, L, E].
    """
    return _ConvSilu.apply(x, reverse, *weights, *biases)


def gate(y: torch.Tensor, z: torch.Tensor, scale: float) -> torch.Tensor:
    """The sum of all directions times `scale` times silu(z): [K, B, L, E], [B, L, E] -> [B, L, E] in y's dtype."""
    return _Gate.apply(y, z, scale)


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, reverse: tuple[bool, ...], *parameters: torch.Tensor) -> torch.Tensor:
        wide = _wide(x, *parameters)
        taps = _packed(parameters, len(reverse), wide)
        ctx.save_for_backward(x, taps, *parameters)
        ctx.reverse = reverse
        u = torch.empty(len(reverse), *x.shape, dtype=wide)
        tiles = x.shape[0] * math.ceil(x.shape[1] / CHUNK)
        _run(CONV, {"x": x.to(wide)}, {"taps": taps, "u": u}, reverse, tiles, 1)
        return u.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_u: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, taps, *parameters = ctx.saved_tensors
        gx, gtaps = _ConvSiluGradients.apply(grad_u, x, taps, ctx.reverse)
        window, width = taps.shape[1] - 1, x.shape[2]
        found: list[torch.Tensor | None] = []
        for i, parameter in enumerate(parameters):
            k = i % len(ctx.reverse)
            if i < len(ctx.reverse):
                taps_of = gtaps[k, :window, :width].mT.unsqueeze(1)
                found.append(taps_of.to(parameter.dtype, memory_format=torch.contiguous_format, copy=True))
            else:
                found.append(gtaps[k, window, :width].to(parameter.dtype))
        return gx, None, *found


class _ConvSiluGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad_u: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, reverse: tuple[bool, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, width = x.shape
        items = batch * math.ceil(length / TILE)
        gx = torch.empty(x.shape, dtype=taps.dtype)
        gtaps = torch.zeros(items, *taps.shape, dtype=taps.dtype)
        inputs = {"x": x.to(taps.dtype), "grad_u": grad_u.to(taps.dtype)}
        steps = TILE + 2 * (taps.shape[1] - 2)  # with those that a tap reaches
        rows = len(reverse) * steps * padded_width(width) // kernel("mixer", _name(taps.dtype)).lanes + 1
        places = {"taps": taps, "gx": gx, "gtaps": gtaps}
        _run(CONV_BACKWARD, inputs, places, reverse, items, rows)
        return gx.to(x.dtype), gtaps.sum(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        _refuse_second_derivatives()


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, z: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(y, z)
        ctx.scale = scale
        wide = _wide(y, z)
        out = torch.empty(z.shape, dtype=wide)
        _run_gate({"y": y.to(wide), "z": z.to(wide)}, {"out": out}, scale)
        return out.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        y, z = ctx.saved_tensors
        gy, gz = _GateGradients.apply(grad_out, y, z, ctx.scale)
        return gy.expand(y.shape), gz, None


class _GateGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad_out: torch.Tensor, y: torch.Tensor, z: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = _wide(y, z)
        gy, gz = torch.empty(z.shape, dtype=wide), torch.empty(z.shape, dtype=wide)
        inputs = {"y": y.to(wide), "z": z.to(wide), "grad_out": grad_out.to(wide)}
        _run_gate(inputs, {"gy": gy, "gz": gz}, scale)
        return gy.to(y.dtype), gz.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        _refuse_second_derivatives()


def _refuse_second_derivatives() -> None:
    raise ModelError("the fused mixer has no second derivatives", expected='a model with backend="reference"')


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _packed(parameters: Sequence[torch.Tensor], directions: int, dtype: torch.dtype) -> torch.Tensor:
    """[K, W + 1, P]: taps in the order of each direction's time, then the bias; 0 beyond the width."""
    width, _, window = parameters[0].shape
    packed = torch.zeros(directions, window + 1, padded_width(width), dtype=dtype)
    for k in range(directions):
        packed[k, :window, :width] = parameters[k][:, 0].mT
        packed[k, window, :width] = parameters[directions + k]
    return packed


def _name(dtype: torch.dtype) -> str:
    return f"mixer_{str(dtype).removeprefix('torch.')}"


def _run_gate(inputs: dict[str, torch.Tensor], places: dict[str, torch.Tensor], scale: float) -> None:
    directions, batch, length = inputs["y"].shape[:3]
    factor = torch.tensor([scale], dtype=inputs["y"].dtype)
    _run(GATE, inputs, {**places, "factor": factor}, (False,) * directions, batch * math.ceil(length / CHUNK), 1)


def _run(
    kind: int,
    inputs: dict[str, torch.Tensor],
    places: dict[str, torch.Tensor],
    reverse: tuple[bool, ...],
    items: int,
    rows: int,
) -> None:
    batch, length, width = inputs["x" if "x" in inputs else "z"].shape
    dtype, backwards = next(iter(inputs.values())).dtype, np.array(reverse, np.int64)
    inputs = {name: tensor.resolve_neg() for name, tensor in inputs.items()}
    values = {
        "kind": kind, "directions": len(reverse), "batch": batch, "length": length, "width": width,
        "padded": padded_width(width), "window": places["taps"].shape[1] - 1 if "taps" in places else 0,
        "reverse": backwards.ctypes.data,
        **{name: tensor.data_ptr() for name, tensor in {**inputs, **places}.items()},
        **{f"{name}_{axis}": tensor.stride(i) for name, tensor in inputs.items() for i, axis in
           enumerate(MIXER_STRIDED[name])},
    }  # fmt: skip
    kernel("mixer", _name(dtype)).run(MIXER, values, items, rows, dtype)
