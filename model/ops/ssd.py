"""The state-space operator of Mamba-2 and Mamba-3 (SSD): a loop over time, and the same as matrix products.

Legend: … any leading dimensions, as of images; L length; H heads; P head width; N state size; G groups of H / G
neighboring heads that share B and C; Q length of a chunk. x, y […, L, H, P]; log_decay […, L, H]; B, C […, L, G, N].
Each head, from the first step to the last, with a state h [P, N] that begins at zero:

    h_t = exp(log_decay_t) h_{t-1} + x_t B_tᵀ
    y_t = h_t C_t

In Mamba-2, x is the input times the step size, and the logarithm of the decay is the step size times A (Dao and Gu,
"Transformers are SSMs", 2024). Mamba-3's recurrence, with the trapezoidal rule and a state that turns, is one such
operator on other inputs (`trapezoid_ssd`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model.ops.scan_reference import state_dtype

# Longest chunk. On one core (B 8, L 197, H 8, P 48, N 128), chunks of at most 64, 32 and 16 took 1.2, 1.4 and 1.7 times
# as long as one of 197, forward and backward.
CHUNK = 256

Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ssd_reference(x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """The recurrence, step by step; shapes as in the legend.

    Args:
        x: input.
        log_decay: logarithm of the factor of each step; at most 0.
        B: input weights.
        C: output weights.

    Returns:
        y in x's dtype; the state is float32, or float64 if an input is.

    Raises:
        ModelError: the shapes do not fit together.
    """
    shared = _check(x, log_decay, B, C)
    dtype = state_dtype(x, log_decay, B, C)
    decay = log_decay.to(dtype).exp()[..., None, None]
    b, c = (part.to(dtype).repeat_interleave(shared, -2) for part in (B, C))
    state = x.new_zeros(*x.shape[:-3], *x.shape[-2:], B.shape[-1], dtype=dtype)
    outputs = []
    for t in range(x.shape[-3]):
        state = decay[..., t, :, :, :] * state + x[..., t, :, :, None].to(dtype) * b[..., t, :, None, :]
        outputs.append((state * c[..., t, :, None, :]).sum(-1))
    return torch.stack(outputs, -3).to(x.dtype)


def ssd_chunked(
    x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """The same as matrix products, for any length; arguments as in `ssd_reference`.

    Within a chunk each step sees the others as in attention without softmax, weighted by the decay between them. What
    came before the chunk reaches it through one state per chunk.

    Args:
        x: input.
        log_decay: logarithm of the factor of each step; at most 0.
        B: input weights.
        C: output weights.
        chunk: longest chunk; the sequence is divided into chunks of equal length.

    Returns:
        y in x's dtype. Products of matrices are in x's dtype, decays and sums of chunks in float32, or in float64 if an
        input is.

    Raises:
        ModelError: the shapes do not fit together, or the chunk is empty.
    """
    shared = _check(x, log_decay, B, C)
    if chunk < 1:
        raise ModelError("a chunk holds no step", got=f"chunk = {chunk}", expected="1 or more")
    length, groups = x.shape[-3], B.shape[-2]
    count = -(-length // chunk)
    size = -(-length // count)
    missing = count * size - length  # a padded step brings in nothing, and none comes after it
    out = x.dtype
    products = torch.float64 if state_dtype(x, log_decay, B, C) == torch.float64 else out
    x, log_decay, B, C = (_chunks(part, count, size, missing) for part in (x, log_decay.unsqueeze(-1), B, C))
    # Now […, count, H or G, size, P, 1 or N]; heads of a group lie side by side.
    x, B, C = (part.to(products) for part in (x, B, C))
    log_decay = log_decay.squeeze(-1).to(state_dtype(log_decay, x))
    between = _segment_sums(log_decay).exp()
    weights = (C @ B.mT).unsqueeze(-3) * between.unflatten(-3, (groups, shared))
    y = weights.to(products) @ x.unflatten(-3, (groups, shared))
    if count > 1:
        y = y + _from_earlier_chunks(x, log_decay, B, C, between[..., -1, :], shared)
    y = y.flatten(-4, -3).transpose(-3, -2).flatten(-4, -3)
    return y[..., :length, :, :].to(out)


OPERATORS: dict[str, Operator] = {"auto": ssd_chunked, "chunked": ssd_chunked, "reference": ssd_reference}


def ssd_scan(
    x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """`ssd_reference` or `ssd_chunked`, by name; "auto" is the latter. Raises ModelError if the name is unknown."""
    if backend not in OPERATORS:
        raise ModelError("unknown backend", got=repr(backend), expected=f"one of {', '.join(OPERATORS)}")
    return OPERATORS[backend](x, log_decay, B, C)


def trapezoid_reference(
    x: torch.Tensor,
    step: torch.Tensor,
    log_decay: torch.Tensor,
    share: torch.Tensor,
    turn: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> torch.Tensor:
    """Mamba-3's recurrence, step by step (Lahoti et al., "Mamba-3", 2026).

    A step's input enters in two parts, as in the trapezoidal rule: `share` of it at once, the rest at the next step,
    after that step's decay. Pairs of neighboring states turn against each other, which makes them one complex state:

        h_t = exp(log_decay_t) R(−turn_t) (h_{t-1} + (1 − share_t) step_t x_{t-1} B_{t-1}ᵀ) + share_t step_t x_t B_tᵀ
        y_t = h_t C_t

    Args:
        x: input, […, L, H, P].
        step: step sizes, […, L, H].
        log_decay: logarithm of the factor of each step, […, L, H]; at most 0.
        share: of the input that enters at once, […, L, H], between 0 and 1.
        turn: angles by which the first 2 · A states turn at each step, […, L, H, A], in radians.
        B: input weights of each head, […, L, H, N].
        C: output weights of each head, […, L, H, N].

    Returns:
        y […, L, H, P] in x's dtype; the state is float32, or float64 if an input is.
    """
    dtype = state_dtype(x, step, log_decay, share, turn, B, C)
    values, b, c = x.to(dtype), B.to(dtype), C.to(dtype)
    now = (share * step).to(dtype)[..., None, None]
    later = ((1 - share) * step).to(dtype)[..., None, None]
    decay = log_decay.to(dtype).exp()[..., None, None]
    state = values.new_zeros(*x.shape[:-3], *x.shape[-2:], B.shape[-1])
    before, outputs = torch.zeros_like(state), []
    for t in range(x.shape[-3]):
        entering = values[..., t, :, :, None] * b[..., t, :, None, :]
        turned = rotate_pairs(state + later[..., t, :, :, :] * before, -turn.to(dtype)[..., t, :, None, :])
        state = decay[..., t, :, :, :] * turned + now[..., t, :, :, :] * entering
        outputs.append((state * c[..., t, :, None, :]).sum(-1))
        before = entering
    return torch.stack(outputs, -3).to(x.dtype)


def trapezoid_ssd(
    x: torch.Tensor,
    step: torch.Tensor,
    log_decay: torch.Tensor,
    share: torch.Tensor,
    turn: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """The same by `ssd_scan`; arguments as in `trapezoid_reference`.

    Instead of the state, B and C turn, by the sum of all angles so far. Both parts of an input pass the same decays
    from the next step on, so later steps see their sum; the step itself sees only the first part, and what is too much
    there is taken away again.
    """
    if backend == "reference":
        return trapezoid_reference(x, step, log_decay, share, turn, B, C)
    angle = turn.to(state_dtype(turn)).cumsum(-3)
    b, c = (rotate_pairs(part, angle).to(x.dtype) for part in (B, C))
    now, rest = share * step, (1 - share) * step
    rest = F.pad(rest[..., 1:, :], (0, 0, 0, 1))  # the part of each step's input that enters at the next step
    y = ssd_scan((x * (now + rest).unsqueeze(-1)).to(x.dtype), log_decay, b, c, backend)
    return (y - x * ((b * c).sum(-1) * rest).unsqueeze(-1)).to(x.dtype)


def rotate_pairs(vectors: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighboring values […, N] by an angle […, A] in radians; those beyond 2 · A stay."""
    turned = 2 * angles.shape[-1]
    one, other = vectors[..., :turned].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack([one * cos - other * sin, one * sin + other * cos], -1).flatten(-2)
    return torch.cat([pairs, vectors[..., turned:].to(pairs.dtype)], -1)


def _from_earlier_chunks(
    x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor, to_end: torch.Tensor, shared: int
) -> torch.Tensor:
    """What a chunk's steps see of the chunks before: […, count, G, H / G, Q, P].

    Args:
        x: […, count, H, Q, P].
        log_decay: […, count, H, Q].
        B: […, count, G, Q, N].
        C: […, count, G, Q, N].
        to_end: factor from each step to the end of its chunk, […, count, H, Q].
        shared: heads per group.
    """
    groups = B.shape[-3]
    heads = (groups, shared)
    inputs = (x * to_end.unsqueeze(-1)).to(x.dtype).unflatten(-3, heads)
    states = B.mT.unsqueeze(-3) @ inputs  # what each chunk leaves: […, count, G, H / G, N, P]
    passed = log_decay.cumsum(-1)
    # The state before a chunk: all states left earlier, times the decay of the whole chunks between.
    across = _segment_sums(passed[..., -1].mT).exp()  # […, H, count, count]
    flat = states.flatten(-4, -3).flatten(-2).transpose(-3, -2)  # […, H, count, N · P]
    before = F.pad((across.to(flat.dtype) @ flat)[..., :-1, :], (0, 0, 1, 0))
    before = before.transpose(-3, -2).unflatten(-1, states.shape[-2:]).unflatten(-3, heads)
    y = C.unsqueeze(-3) @ before
    return (y * passed.exp().unflatten(-2, heads).unsqueeze(-1)).to(x.dtype)


def _segment_sums(steps: torch.Tensor) -> torch.Tensor:
    """[…, Q] to […, Q, Q]: in row t and column s the sum over s < r ≤ t, and −infinity where s > t.

    Differences of a running sum in float32 would lose the small distances behind a long past. Here it has two parts,
    the sum rounded and what the rounding left, whose gradient is none.
    """
    size = steps.shape[-1]
    total = steps.double().cumsum(-1)
    rounded = total.to(steps.dtype)
    rest = (total - rounded).to(steps.dtype).detach()
    sums = (rounded.unsqueeze(-1) - rounded.unsqueeze(-2)) + (rest.unsqueeze(-1) - rest.unsqueeze(-2))
    past = torch.ones(size, size, dtype=torch.bool, device=steps.device).tril()
    return sums.masked_fill(~past, -torch.inf)


def _chunks(part: torch.Tensor, count: int, size: int, missing: int) -> torch.Tensor:
    """[…, L, H, P] to […, count, H, size, P], with zeros after the last step."""
    if missing:
        part = F.pad(part, (0, 0, 0, 0, 0, missing))
    return part.unflatten(-3, (count, size)).transpose(-3, -2)


def _check(x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> int:
    """Heads per group. Raises ModelError if the shapes do not fit together."""
    fits = x.ndim >= 3 and B.ndim == x.ndim and B.shape[-2] > 0 and not x.shape[-2] % B.shape[-2] and x.shape[-3]
    if not fits or log_decay.shape != x.shape[:-1] or B.shape[:-2] != x.shape[:-2] or C.shape != B.shape:
        shapes = ", ".join(str(list(part.shape)) for part in (x, log_decay, B, C))
        raise ModelError(
            "the shapes of x, log_decay, B and C do not fit together",
            got=shapes,
            expected="[…, L, H, P], […, L, H] and twice […, L, G, N], with L at least 1 and H a multiple of G",
        )
    return x.shape[-2] // B.shape[-2]
