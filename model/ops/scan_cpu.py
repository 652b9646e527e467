"""The selective scan on a CPU without Numba, forward and backward by hand; `fused_cpu/scan.py` is faster.

Legend: K directions, B batch, L length, E inner width, N state size. u, delta, y [K, B, L, E]; A [K, E, N];
B, C [K, B, L, N]; D, delta_bias [K, E] or None; saved [⌈L/8⌉, K, B, N, E]. Each direction, in its
running order of time:

    dt = delta + delta_bias, or softplus of it
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    y_t = C_t · h_t + D u_t

Time is split into chunks of 8 steps, whose states [8, K, B, N, E] stay in the cache through all passes over them; time
comes first and E last, so that a step is one long vectorized operation for all directions and images. Only the state
before each chunk is saved, and the backward pass recomputes the others, which is faster than reading them from memory:
forward 30 ms and backward 80 ms instead of 106 and 196 in one chunk (B 8, L 197, E 384, N 16, two directions, two
cores; measured on a first version; chunks of 4 took 20 % longer, of 16 4 %).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F

from model.ops.scan_reference import state_dtype

CHUNK = 8

Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None
]


class Steps(NamedTuple):
    """The inputs of the recurrence, time first and in running order."""

    dt: torch.Tensor  # [L, K, B, E]
    dtu: torch.Tensor  # [L, K, B, E], dt · u
    A: torch.Tensor  # [K, 1, N, E]
    B: torch.Tensor  # [L, K, B, N]
    C: torch.Tensor  # [L, K, B, N]
    lowest: float | None  # lower bound to clamp dt · A to; None: it never gets that low


class WorkSpace(NamedTuple):
    """Buffer for a chunk. The views of its steps are created once, as creating one takes almost as long as a step."""

    all: torch.Tensor  # [8, K, B, N, E]
    each: tuple[torch.Tensor, ...]

    @classmethod
    def like(cls, saved: torch.Tensor) -> WorkSpace:
        """A buffer for states like those in `saved` [⌈L/8⌉, K, B, N, E]."""
        room = saved.new_empty(CHUNK, *saved.shape[1:])
        return cls(room, room.unbind())


def saved_shape(u: torch.Tensor, A: torch.Tensor) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps: the one before each chunk."""
    directions, batch, length, width = u.shape
    return (length + CHUNK - 1) // CHUNK, directions, batch, A.shape[2], width


def forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """y in u's dtype, and the state before each chunk, for `backward`."""
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias)
    saved = torch.empty(saved_shape(u, A), dtype=dtype)
    saved[:1] = 0
    with flushed_denormals():
        us, steps, _ = _prepare(u, delta, A, B, C, delta_bias, delta_softplus, reverse, dtype)
        decay, states = WorkSpace.like(saved), WorkSpace.like(saved)
        y = torch.empty_like(us)
        for chunk, before in enumerate(saved):
            now = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, len(us)))
            n = _run_chunk(steps, now, before, decay, states)
            torch.bmm(_rows(steps.C[now]), _flat(states.all[:n]), out=_rows(y[now]))
            if chunk + 1 < len(saved):
                _drop_tiny(states.each[n - 1], out=saved[chunk + 1])
        if D is not None:
            y.addcmul_(us, D.to(dtype).unsqueeze(1))
        return _from_steps(y, reverse, u.dtype), saved


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
    reverse: Sequence[bool],
) -> Gradients:
    """Gradients of u, delta, A, B, C, D and delta_bias, each in its input's dtype; None for an input that is None."""
    dtype = saved.dtype
    with flushed_denormals():
        us, steps, raw = _prepare(u, delta, A, B, C, delta_bias, delta_softplus, reverse, dtype)
        gy = _to_steps(grad_y, reverse, dtype)
        gdt, gdtu, gA, gB, gC = _reverse_recurrence(gy, steps, saved)
        # dt enters through the decay and dt · u; u through dt · u and D.
        gdt.addcmul_(gdtu, us)
        gu = gdtu.mul_(steps.dt)
        if D is not None:
            gu.addcmul_(gy, D.to(dtype).unsqueeze(1))
        if delta_softplus:
            gdt = torch.ops.aten.softplus_backward(gdt, raw, 1, 20)  # F.softplus is the identity above 20
        return (
            _from_steps(gu, reverse, u.dtype),
            _from_steps(gdt, reverse, delta.dtype),
            gA.sum(1).mT.to(A.dtype, memory_format=torch.contiguous_format, copy=True),
            _from_steps(gB, reverse, B.dtype),
            _from_steps(gC, reverse, C.dtype),
            None if D is None else (gy * us).sum((0, 2)).to(D.dtype),
            None if delta_bias is None else gdt.sum((0, 2)).to(delta_bias.dtype),
        )


def _run_chunk(steps: Steps, now: slice, before: torch.Tensor, decay: WorkSpace, states: WorkSpace) -> int:
    """Fill `decay` with exp(dt A) and `states` with h, from the state before the chunk. Returns the number of steps."""
    dt, b, dtu = steps.dt[now], steps.B[now], steps.dtu[now]
    n = len(dt)
    decays = decay.all[:n]
    torch.mul(dt.unsqueeze(-2), steps.A, out=decays)
    if steps.lowest is not None:
        decays.clamp_(min=steps.lowest)
    decays.exp_()
    torch.mul(b.unsqueeze(-1), dtu.unsqueeze(-2), out=states.all[:n])
    for state, kept in zip(states.each[:n], decay.each, strict=False):
        before = state.addcmul_(kept, before)
    return n


def _reverse_recurrence(gy: torch.Tensor, steps: Steps, saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of dt (through the decay only), dt · u, A [K, B, N, E], B and C, time first.

    With g_t the gradient of h_t: g_t = C_t gy_t + exp(dt_{t+1} A) g_{t+1}, from the last step to the first.
    """
    gdt, gdtu = torch.empty_like(gy), torch.empty_like(gy)
    gB, gC = torch.empty_like(steps.B), torch.empty_like(steps.C)
    gA = torch.zeros_like(saved[0])
    carry = torch.zeros_like(gA)  # exp(dt_{t+1} A) g_{t+1}
    decay, states, g = (WorkSpace.like(saved) for _ in range(3))
    for chunk in reversed(range(len(saved))):
        now = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, len(gy)))
        n = _run_chunk(steps, now, saved[chunk], decay, states)
        b, c, dt, dtu, gy_now = (tensor[now] for tensor in (steps.B, steps.C, steps.dt, steps.dtu, gy))
        torch.bmm(_flat(states.all[:n]), _columns(gy_now), out=_columns(gC[now]))
        c_each, gy_each = c.unsqueeze(-1).unbind(), gy_now.unsqueeze(-2).unbind()
        for t in reversed(range(n)):
            torch.addcmul(carry, c_each[t], gy_each[t], out=g.each[t])
            carry = decay.each[t].mul_(g.each[t])
        torch.bmm(_flat(g.all[:n]), _columns(dtu), out=_columns(gB[now]))
        torch.bmm(_rows(b), _flat(g.all[:n]), out=_rows(gdtu[now]))
        carry = _drop_tiny(carry)
        exponent = decay.all[:n]  # the gradient of dt · A: g_t exp(dt_t A) h_{t-1}
        exponent[0].mul_(saved[chunk])
        exponent[1:].mul_(states.all[: n - 1])
        for one, dt_one in zip(decay.each, dt.unsqueeze(-2).unbind(), strict=False):
            gA.addcmul_(one, dt_one)
        torch.sum(exponent.mul_(steps.A), -2, out=gdt[now])
    return gdt, gdtu, gA, gB, gC


def _prepare(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, Steps, torch.Tensor]:
    """u, the inputs of the recurrence, and delta + delta_bias before the softplus."""
    us, raw = _to_steps(u, reverse, dtype), _to_steps(delta, reverse, dtype)
    if delta_bias is not None:
        raw.add_(delta_bias.to(dtype).unsqueeze(1))
    dt = F.softplus(raw) if delta_softplus else raw
    a = A.to(dtype).mT.contiguous().unsqueeze(1)
    # Below this, exp returns denormal numbers, which are three times slower; the last normal number is as good as 0.
    lowest = math.log(2 * torch.finfo(dtype).tiny)
    low = dt.numel() > 0 and float(dt.amax() * a.amin()) < lowest
    steps = Steps(dt, dt * us, a, _to_steps(B, reverse, dtype), _to_steps(C, reverse, dtype), lowest if low else None)
    return us, steps, raw


def _to_steps(x: torch.Tensor, reverse: Sequence[bool], dtype: torch.dtype) -> torch.Tensor:
    """[K, B, L, …] to a new [L, K, B, …] in running order."""
    out = torch.empty(x.shape[2], x.shape[0], x.shape[1], x.shape[3], dtype=dtype)
    for k, backwards in enumerate(reverse):
        out[:, k].copy_((x[k].flip(1) if backwards else x[k]).transpose(0, 1))
    return out


def _from_steps(x: torch.Tensor, reverse: Sequence[bool], dtype: torch.dtype) -> torch.Tensor:
    """[L, K, B, …] in running order to a new [K, B, L, …]."""
    out = torch.empty(x.shape[1], x.shape[2], x.shape[0], x.shape[3], dtype=dtype)
    for k, backwards in enumerate(reverse):
        out[k].copy_((x[:, k].flip(0) if backwards else x[:, k]).transpose(0, 1))
    return out


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[n, K, B, N, E] as a batch of matrices [n·K·B, N, E]; a view, like the two below."""
    return x.flatten(0, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 2).unsqueeze(1)


def _columns(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 2).unsqueeze(2)


def _drop_tiny(state: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Set tiny states to zero, before they become denormal and stay so for many steps."""
    return torch.hardshrink(state, 1e6 * torch.finfo(state.dtype).tiny, out=out)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Treat denormal numbers as zero in this thread; on exit restore the previous setting.

    The processor has one setting per thread. Those of torch's other threads were set when they were started and cannot
    be changed here; the two cut-offs above keep nearly all denormals away from them.
    """
    smallest = sys.float_info.min
    already = smallest * 0.5 == 0.0
    if not already:
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if not already:
            torch.set_flush_denormal(False)
