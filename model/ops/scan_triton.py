"""The selective scan on a GPU, forward and backward, by the kernels of `scan_triton_kernels.py`.

Legend: K directions, B batch, L length, E inner width, N state size. u, delta, y [K, B, L, E]; A [K, E, N];
B, C [K, B, L, N]; D, delta_bias [K, E] or None; saved [K, B, ⌈L/CHUNK⌉, N, E].
For each direction, in its order of time:

    dt = delta + delta_bias, or softplus of it
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    y_t = C_t · h_t + D u_t

Kernels compute in float32 and store in the tensors' dtypes. Sums across programs are torch sums of float32 partial
results, never atomic additions: gradients are reproducible bit for bit.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch

CHUNK = 12  # steps between saved states
STEPS = 4  # steps whose loads come before their use, and whose states the backward kernel keeps; divides CHUNK
# States of one program, which is one warp and so never waits for another: 64 or 16 of them per thread. A thread of the
# forward kernel holds A and the state, one of the backward kernel 2·STEPS + 4 values per state, filling 255 registers.
FORWARD_STATES = 2048
BACKWARD_STATES = 512

Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None
]


def is_available() -> tuple[bool, str]:
    """Whether the kernels can run in this process, and the device that runs them or the reason why none does."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "Triton's interpreter, because TRITON_INTERPRET=1"
    if torch.cuda.is_available():
        return True, torch.cuda.get_device_name()
    return (
        False,
        "torch finds no CUDA device (TRITON_INTERPRET=1, set before Python starts, runs the kernels slowly on a CPU)",
    )


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
    """y [K, B, L, E] in u's dtype, and for `backward`, if `keep`, the states before each chunk.

    The states are float32, [K, B, ⌈L/CHUNK⌉, N, E]; not kept, there are no chunks.
    """
    from model.ops.scan_triton_kernels import scan_forward

    u, delta, A, B, C = (tensor.contiguous() for tensor in (u, delta, A.mT, B, C))
    directions, batch, length, width = u.shape
    states = A.shape[1]
    y = torch.empty_like(u)
    saved = u.new_empty(directions, batch, math.ceil(length / CHUNK) * keep, states, width, dtype=torch.float32)
    blocks, constants = _launch(width, states, FORWARD_STATES)
    if u.numel():
        with torch.cuda.device_of(u):
            scan_forward[(directions * batch * blocks,)](
                u, delta, A, B, C, _contiguous(D), _contiguous(delta_bias), y,
                saved if keep else None,
                batch, length, *_reverse(reverse), SOFTPLUS=delta_softplus, **constants,
            )  # fmt: skip
    return y, saved


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
    from model.ops.scan_triton_kernels import scan_backward

    u, delta, A, B, C = (tensor.contiguous() for tensor in (u, delta, A.mT, B, C))
    shared = grad_y.stride(0) == 0 and grad_y[0].is_contiguous()  # one gradient for all directions, as of their sum
    grad_y = grad_y if shared else grad_y.contiguous()
    directions, batch, length, width = u.shape
    states = A.shape[1]
    blocks, constants = _launch(width, states, BACKWARD_STATES)

    def shares(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return u.new_empty(directions, batch, *shape, dtype=dtype)

    gu, gdelta = torch.empty_like(u), torch.empty_like(delta)
    gA = shares(states, width)
    # A share of these is rounded as their sum is; in float32 they would be a third of what the kernel writes.
    gB, gC = (shares(blocks, length, states, dtype=given.dtype) for given in (B, C))
    gD = None if D is None else shares(width)
    gbias = None if delta_bias is None else shares(width)
    if u.numel():
        with torch.cuda.device_of(u):
            scan_backward[(directions * batch * blocks,)](
                grad_y, u, delta, A, B, C, _contiguous(D), _contiguous(delta_bias), saved,
                gu, gdelta, gA, gB, gC, gD, gbias,
                batch, length, *_reverse(reverse), SOFTPLUS=delta_softplus, SHARED=shared, **constants,
            )  # fmt: skip
    return (
        gu,
        gdelta,
        gA.sum(1).mT.to(A.dtype),
        gB.sum(2, dtype=torch.float32).to(B.dtype),
        gC.sum(2, dtype=torch.float32).to(C.dtype),
        None if D is None or gD is None else gD.sum(1).to(D.dtype),
        None if delta_bias is None or gbias is None else gbias.sum(1).to(delta_bias.dtype),
    )


def share_bytes(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> int:
    """What `backward` writes of sums across programs, and reads again."""
    directions, batch, length, width = u.shape
    states = A.shape[-1]
    blocks, _ = _launch(width, states, BACKWARD_STATES)
    return directions * batch * (4 * (states + 2) * width + 2 * B.element_size() * blocks * length * states)


def _launch(width: int, states: int, program_states: int) -> tuple[int, dict[str, Any]]:
    """The number of programs that share an image's channels, and the constants of the launch."""
    block_n = 1 << (states - 1).bit_length()
    block_e = max(8, min(128, program_states // block_n))
    blocks = math.ceil(width / block_e)
    return blocks, {
        "E": width, "N": states, "P": blocks, "CHUNK": CHUNK, "STEPS": STEPS, "BLOCK_E": block_e, "BLOCK_N": block_n,
        "EVEN_E": not width % block_e, "EVEN_N": states == block_n, "num_warps": 1,
        "enable_fp_fusion": True,  # of multiply and add, which Triton 3.10 leaves off unless asked
    }  # fmt: skip


def _reverse(reverse: tuple[bool, ...]) -> tuple[int, int]:
    """The reversed directions as bits, and their period: many groups would not fit into an integer without it."""
    count = len(reverse)
    period = next(n for n in range(1, count + 1) if count % n == 0 and reverse == reverse[:n] * (count // n))
    return sum(1 << k for k, backwards in enumerate(reverse[:period]) if backwards), period


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
