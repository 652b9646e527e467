"""The selective scan on a CPU by one compiled kernel each for forward and backward, without a compiler: Numba has LLVM.

Legend: K directions, B batch, L length, E inner width, N state size, P: E rounded up to whole vectors.
u, delta, y [K, B, L, E]; A [K, E, N]; B, C [K, B, L, N]; D, delta_bias [K, E] or None;
saved [K, B, ⌈L/16⌉, N, P].

The kernels are in `scan_kernels.py`. They run in torch's own threads: the team of OpenMP threads that serves its
operators on this machine is asked to run one C function. Threads of another library would wait for a core while
torch's threads spin on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from model.ops.fused_cpu.launch_arguments import CHUNK, GROUP, SCAN, SCAN_STRIDED, padded_width, scan_rows
from model.ops.fused_cpu.machine import kernel
from model.ops.scan_reference import state_dtype

Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None
]


def saved_shape(u: torch.Tensor, A: torch.Tensor) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps: the one before each chunk."""
    directions, batch, length, width = u.shape
    return directions, batch, (length + CHUNK - 1) // CHUNK, A.shape[2], padded_width(width)


def forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    reverse: tuple[bool, ...],
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y in u's dtype, and the state before each chunk, for `backward`; without `keep` no states."""
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias)
    inputs = _widened(dtype, u=u, delta=delta, A=A, B=B, C=C, D=D, bias=delta_bias)
    y = torch.empty(u.shape, dtype=dtype)
    shape = saved_shape(u, A)
    saved = torch.empty(shape if keep else (*shape[:2], 0, *shape[3:]), dtype=dtype)
    saved[..., u.shape[3] :] = 0
    _run("forward", inputs, {"y": y, "saved": saved if keep else None}, delta_softplus, reverse)
    return y.to(u.dtype), saved


def backward(
    grad_y: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    saved: torch.Tensor,
    delta_softplus: bool,
    reverse: tuple[bool, ...],
) -> Gradients:
    """Gradients of u, delta, A, B, C, D and delta_bias, each in its input's dtype; None for an input that is None."""
    dtype = saved.dtype
    if not saved.shape[2]:  # a graph that was traced without gradients
        saved = forward(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)[1]
    inputs = _widened(dtype, u=u, delta=delta, A=A, B=B, C=C, D=D, bias=delta_bias, grad_y=grad_y)
    directions, batch, length, width = u.shape
    states, padded = saved.shape[3:]

    def room(*shape: int) -> torch.Tensor:
        return torch.empty(directions, batch, *shape, dtype=dtype)

    groups = math.ceil(width / GROUP)
    gu, gdelta, gA = room(length, width), room(length, width), room(states, padded)
    gD, gbias = room(padded), room(padded)
    gB, gC = room(groups, length, states), room(groups, length, states)
    places = {"saved": saved, "gu": gu, "gdelta": gdelta, "gA": gA, "gB": gB, "gC": gC, "gD": gD, "gbias": gbias}
    _run("backward", inputs, places, delta_softplus, reverse)
    return (
        gu.to(u.dtype),
        gdelta.to(delta.dtype),
        gA[..., :width].sum(1).mT.to(A.dtype, memory_format=torch.contiguous_format, copy=True),
        gB.sum(2).to(B.dtype),
        gC.sum(2).to(C.dtype),
        None if D is None else gD[..., :width].sum(1).to(D.dtype),
        None if delta_bias is None else gbias[..., :width].sum(1).to(delta_bias.dtype),
    )


def _widened(dtype: torch.dtype, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype).resolve_neg() for name, tensor in tensors.items() if tensor is not None}


def _run(
    way: str,
    inputs: dict[str, torch.Tensor],
    places: Mapping[str, torch.Tensor | None],
    delta_softplus: bool,
    reverse: tuple[bool, ...],
) -> None:
    """Fill the arguments' record and have torch's threads run a kernel."""
    directions, batch, length, width = inputs["u"].shape
    states, dtype = inputs["A"].shape[2], inputs["u"].dtype
    compiled = kernel("scan", f"{way}_{str(dtype).removeprefix('torch.')}")
    backwards = np.array(reverse, np.int64)
    values = {
        "directions": directions, "batch": batch, "length": length, "width": width, "padded": padded_width(width),
        "states": states, "softplus": int(delta_softplus), "reverse": backwards.ctypes.data,
        **{name: tensor.data_ptr() for name, tensor in {**inputs, **places}.items() if tensor is not None},
        **{f"{name}_{axis}": tensor.stride(i) for name, tensor in inputs.items() for i, axis in
           enumerate(SCAN_STRIDED[name])},
    }  # fmt: skip
    items = directions * batch * math.ceil(width / (compiled.lanes if way == "forward" else GROUP))
    compiled.run(SCAN, values, items, scan_rows(states), dtype)
