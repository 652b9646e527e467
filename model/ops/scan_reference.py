"""The reference selective scan: a loop over time, differentiated by autograd. Fast backends must equal it.

Legend: K directions, B batch, L length, E inner width, N state size. u, delta, y [K, B, L, E]; A [K, E, N];
B, C [K, B, L, N]; D, delta_bias [K, E] or None. Each direction, in its own running order of time:

    dt = delta + delta_bias, or softplus of it
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    y_t = C_t · h_t + D u_t
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    reverse: Sequence[bool] = (False,),
) -> torch.Tensor:
    """The scan, step by step; shapes as in the legend.

    Args:
        u: input.
        delta: step sizes.
        A: negative.
        B: input weights.
        C: output weights.
        D: skip connection; None: none.
        delta_bias: added to delta; None: none.
        delta_softplus: apply softplus to the sum.
        reverse: for each direction, whether it runs from the last step to the first.

    Returns:
        y in u's dtype; the state is float32, or float64 if an input is.
    """
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias)
    steps = [_running_order(tensor.to(dtype), reverse).unbind(2) for tensor in (u, delta, B, C)]
    h = torch.zeros_like(A, dtype=dtype).unsqueeze(1)
    outputs = []
    for u_t, dt, b_t, c_t in zip(*steps, strict=True):
        if delta_bias is not None:
            dt = dt + delta_bias.to(dtype).unsqueeze(1)
        if delta_softplus:
            dt = F.softplus(dt)
        dt = dt.unsqueeze(-1)
        h = torch.exp(dt * A.to(dtype).unsqueeze(1)) * h + dt * b_t.unsqueeze(-2) * u_t.unsqueeze(-1)
        y_t = (h * c_t.unsqueeze(-2)).sum(-1)
        outputs.append(y_t if D is None else y_t + D.to(dtype).unsqueeze(1) * u_t)
    return _running_order(torch.stack(outputs, 2), reverse).to(u.dtype)


def scan_by_doubling(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    reverse: Sequence[bool] = (False,),
) -> torch.Tensor:
    """`scan_reference` for exported graphs: about log2 L rounds of plain operators instead of L steps.

    After round r, `state` holds the contribution of the last 2^r steps to each step, and `decay` the factor by which
    they shrink the state before them (Hillis and Steele, 1986).
    """
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias)
    u_run, dt, b, c = (_running_order(tensor.to(dtype), reverse) for tensor in (u, delta, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None, None]
    if delta_softplus:
        dt = F.softplus(dt)
    decay = torch.exp(dt.unsqueeze(-1) * A.to(dtype)[:, None, None])
    state = (dt * u_run).unsqueeze(-1) * b.unsqueeze(-2)
    length, reach = u.shape[2], 1
    while reach < length:
        later = (0, 0, 0, 0, reach, 0)
        state = state + decay * F.pad(state[:, :, :-reach], later)
        decay = decay * F.pad(decay[:, :, :-reach], later)
        reach *= 2
    y = (state * c.unsqueeze(-2)).sum(-1)
    if D is not None:
        y = y + D.to(dtype)[:, None, None] * u_run
    return _running_order(y, reverse).to(u.dtype)


def last_state(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> torch.Tensor:
    """h after the last step in running order, [K, B, E, N]: each step's contribution times its decay since then.

    All steps at once, so it needs the memory of L states.
    """
    dtype = state_dtype(u, delta, A, B, delta_bias)
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None, None]
    if delta_softplus:
        dt = F.softplus(dt)
    latest_first = [x.to(dtype) if reverse else x.to(dtype).flip(2) for x in (dt, dt * u, B)]
    since = latest_first[0].cumsum(2) - latest_first[0]
    kept = torch.exp(since.unsqueeze(-1) * A.to(dtype)[:, None, None])
    return torch.einsum("kble,kbln,kblen->kben", *latest_first[1:], kept)


def state_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if one of the tensors is, else float32: a half-precision state would lose small steps."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _running_order(x: torch.Tensor, reverse: Sequence[bool]) -> torch.Tensor:
    """x [K, B, L, …] with the reversed directions flipped along L; its own inverse."""
    if not any(reverse):
        return x
    return torch.stack([steps.flip(1) if backwards else steps for steps, backwards in zip(x, reverse, strict=True)])
