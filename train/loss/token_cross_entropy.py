"""Token cross-entropy with sparse targets as torch operators, for CPUs and, through Triton, for GPUs.

Legend: B images; C classes; P palette size; R tail size; T tokens. The formulas are in `train.loss.token_label_loss`.
"""

from __future__ import annotations

from typing import Any

import torch

from model.ops.scan_operators import transforms_are_active
from train.loss.loss_checks import check_targets, checked_tail, refuse_unknown_classes
from train.loss.loss_transforms import TransformedLoss, no_second_derivative
from train.loss.smoothed_targets import SmoothedTarget, Tail, blocks, dense_tail, smoothed_target, sum_dtype


def spread_weight(logits: torch.Tensor, weight: float) -> torch.Tensor:
    """[B, T]: each token's share of `weight` · the mean over the tokens of logits [B, T, C]."""
    batch, tokens, _ = logits.shape
    return logits.new_full((), weight / (batch * tokens), dtype=sum_dtype(logits)).expand(batch, tokens)


def token_cross_entropy(
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    in_place: bool = False,
    *,
    tail_classes: torch.Tensor | None = None,
    tail_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum over all tokens of the cross-entropy with smoothed targets.

    Only the logits get a gradient; it cannot be differentiated again.

    Args:
        logits: [B, T, C].
        classes: int64 [B, P]: palette class ids, −1 for unused slots.
        scores: [B, P, T]: scores of the palette's classes.
        background: [B, T]: score of every other class.
        smoothing: label smoothing.
        partner: bool [T]: tokens whose target is taken from image B−1−b; None: no token.
        weight: [B, T]; None: 1/(B·T), the mean.
        in_place: the backward pass overwrites the logits with their gradient. Ignored while compiling, and for logits
            that are a leaf or not contiguous. Another backward pass that needs these logits later raises an error.
        tail_classes: int64 [B, R]: classes outside the palette, −1 for unused slots; None: no tail.
        tail_offsets: [B, R]: their scores minus the background, the same in every token.

    Returns:
        A scalar in float32, or float64 for float64 logits.

    Raises:
        InputError: shapes, dtypes or devices do not fit, or the targets name a class that the logits lack.
    """
    weight = spread_weight(logits, 1.0) if weight is None and logits.ndim == 3 else weight
    check_targets(logits, classes, scores, background, partner, weight)
    tail_classes, tail_offsets = checked_tail(logits, tail_classes, tail_offsets)
    targets = classes, scores, background, weight, float(smoothing), partner, tail_classes, tail_offsets
    if transforms_are_active():
        return TransformedLoss.apply(logits, *targets)[0]
    over = in_place and not logits.is_leaf and logits.is_contiguous() and not torch.compiler.is_compiling()
    wanted = logits.requires_grad and torch.is_grad_enabled()
    early = wanted and not over and not torch.compiler.is_compiling()
    early = early and logits.device.type == "cpu" and logits.dtype == sum_dtype(logits)
    return _loss_op(logits, *targets, early, over)[0]


@torch.library.custom_op("token_labeling::token_cross_entropy", mutates_args=())
def _loss_op(
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    weight: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    tail_classes: torch.Tensor | None,
    tail_offsets: torch.Tensor | None,
    early: bool,
    over: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum of losses, logsumexp [B, T], and with `early` the gradient [B, T, C], else an empty tensor.

    `over`: the backward pass may overwrite the logits.
    """
    refuse_unknown_classes(classes, tail_classes, logits.shape[2])
    loss, lse = (logits.new_empty(logits.shape[:2], dtype=sum_dtype(logits)) for _ in range(2))
    gradient = _new_gradient(logits, early)
    tail = _used_tail(logits, classes, tail_classes, tail_offsets)
    for block, parts in blocks(logits):
        target = smoothed_target(
            classes, scores, background, smoothing, partner, tail, block, logits.shape[2], lse.dtype
        ).subtracted(weight[block])
        spread, at_ids = torch.empty_like(lse[block]), lse.new_empty(target.ids.shape)
        for images, within in parts:
            x = logits[images].to(lse.dtype)
            powers, norm, shift = _powers(x, gradient[images] if early else torch.empty_like(x))
            torch.log(norm[..., 0], out=lse[images])
            if shift is not None:
                lse[images] += shift
            spread[within] = target.dot_spread(x, within)
            torch.gather(x, 2, target.ids[within], out=at_ids[within])
            if early:
                _finish_gradient(powers, target.total[within, :, None] / norm, target, within)
        loss[block] = target.total * lse[block] - spread + at_ids.mul_(target.extra).sum(2)
    return loss.sum(), lse, gradient


def _used_tail(
    logits: torch.Tensor, classes: torch.Tensor, tail_classes: torch.Tensor | None, tail_offsets: torch.Tensor | None
) -> Tail | None:
    if tail_classes is None or tail_offsets is None or not bool((tail_classes >= 0).any()):
        return None
    return dense_tail(classes, tail_classes, tail_offsets, logits.shape[2], sum_dtype(logits))


def _new_gradient(logits: torch.Tensor, early: bool) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format) if early else logits.new_empty(0)


def _powers(x: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """e^(x − shift) in `out`, its sum [n, T, 1] over classes, and the shift [n, T].

    Logits of usual size need no shift, which saves two passes over them. Within the bounds every power that matters is
    a normal number; NaN and infinity are outside.
    """
    powers = torch.exp(x, out=out)
    norm = powers.sum(2, keepdim=True)
    low, high = norm.aminmax()
    if low > 1e-20 and high < 1e30:
        return powers, norm, None
    top = x.amax(2, keepdim=True)
    powers = torch.sub(x, top, out=out).exp_()
    return powers, powers.sum(2, keepdim=True), top[..., 0]


def _finish_gradient(powers: torch.Tensor, factor: torch.Tensor, target: SmoothedTarget, within: slice) -> None:
    """Turn powers of e [n, T, C] into factor·powers − target, in place; `target` from `SmoothedTarget.subtracted`."""
    target.subtract_spread(powers.mul_(factor), within).scatter_add_(2, target.ids[within], target.extra[within])


@_loss_op.register_fake
def _(logits, classes, scores, background, weight, smoothing, partner, tail_classes, tail_offsets, early, over):  # type: ignore[no-untyped-def]
    dtype = sum_dtype(logits)
    lse = logits.new_empty(logits.shape[:2], dtype=dtype)
    return logits.new_empty((), dtype=dtype), lse, _new_gradient(logits, early)


@_loss_op.register_kernel("cuda")
def _(logits, classes, scores, background, weight, smoothing, partner, tail_classes, tail_offsets, early, over):  # type: ignore[no-untyped-def]
    from train.loss import loss_triton

    loss, lse = loss_triton.token_loss(
        logits, classes, scores, background, smoothing, partner, tail_classes, tail_offsets
    )
    return (loss * weight).sum(), lse, logits.new_empty(0)


def _write_gradient(
    weight: torch.Tensor,
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    tail_classes: torch.Tensor | None,
    tail_offsets: torch.Tensor | None,
    lse: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the gradient of Σ weight·loss to `out`, which may be the logits."""
    if logits.is_cuda:
        from train.loss import loss_triton

        loss_triton.token_gradient(
            weight, logits, classes, scores, background, smoothing, partner, tail_classes, tail_offsets, lse, out
        )
        return
    tail = _used_tail(logits, classes, tail_classes, tail_offsets)
    for block, parts in blocks(logits):
        target = smoothed_target(
            classes, scores, background, smoothing, partner, tail, block, logits.shape[2], lse.dtype
        ).subtracted(weight[block])
        for images, within in parts:
            x = logits[images].to(lse.dtype)
            powers = torch.sub(x, lse[images, :, None], out=out[images] if out.dtype == x.dtype else x).exp_()
            _finish_gradient(powers, target.total[within, :, None], target, within)
            if out.dtype != x.dtype:
                out[images] = powers


@torch.library.custom_op("token_labeling::token_cross_entropy_gradient", mutates_args=())
def _gradient_op(
    weight: torch.Tensor,
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    tail_classes: torch.Tensor | None,
    tail_offsets: torch.Tensor | None,
    lse: torch.Tensor,
) -> torch.Tensor:
    out = _new_gradient(logits, True)
    _write_gradient(
        weight, logits, classes, scores, background, smoothing, partner, tail_classes, tail_offsets, lse, out
    )
    return out


@_gradient_op.register_fake
def _(weight, logits, *_):  # type: ignore[no-untyped-def]
    return _new_gradient(logits, True)


@torch.library.custom_op("token_labeling::token_cross_entropy_gradient_", mutates_args=("logits",))
def _gradient_over_logits_op(
    weight: torch.Tensor,
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    tail_classes: torch.Tensor | None,
    tail_offsets: torch.Tensor | None,
    lse: torch.Tensor,
) -> None:
    _write_gradient(
        weight, logits, classes, scores, background, smoothing, partner, tail_classes, tail_offsets, lse, logits
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, classes, scores, background, weight, ctx.smoothing, *optional, ctx.early, ctx.over = inputs
    _, lse, gradient = output
    ctx.mark_non_differentiable(lse, gradient)
    ctx.set_materialize_grads(False)  # otherwise torch allocates zeros as the gradient of `gradient`
    ctx.save_for_backward(logits, classes, scores, background, weight, *optional, lse)
    ctx.gradient = gradient if ctx.early else None


def _backward(ctx: Any, factor: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if factor is None:
        return (None,) * 11
    if torch.is_grad_enabled():
        no_second_derivative(ctx)
    logits, classes, scores, background, weight, *optional, lse = ctx.saved_tensors
    targets = classes, scores, background
    if ctx.early:
        # The early gradient is handed out once. Later passes through a retained graph compute it again, bit for bit.
        out, ctx.gradient = ctx.gradient, None
        if out is None:
            out = _loss_op(logits, *targets, weight, ctx.smoothing, *optional, True, False)[2]
        out = out if factor == 1 else out.mul_(factor)
        return (out, *(None,) * 10)
    arguments = (weight * factor, logits, *targets, ctx.smoothing, *optional, lse)
    if ctx.over:
        _gradient_over_logits_op(*arguments)
        out = logits.detach()
    else:
        out = _gradient_op(*arguments)
    return (out, *(None,) * 10)


_loss_op.register_autograd(_backward, setup_context=_keep)
