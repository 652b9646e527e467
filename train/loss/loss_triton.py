"""The closed-form token loss as two Triton kernels, one program per token: the loss, and its gradient.

Legend: B images; T tokens; C classes; P palette size; R tail size.

The formula is in `token_label_loss`. The first kernel reads a token's logits once, in blocks, with a running maximum,
and saves their logsumexp; the second reads them once more and writes S·softmax − target, scaled by the token's incoming
gradient, to a new tensor or over the logits. Sums are in float32, in float64 for float64 logits. With a tail a program
also reads its image's weight of each class; without one other kernels are compiled. A class id that the logits lack
makes the token's loss and gradient NaN: raising an error would wait for the device.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from train.loss.smoothed_targets import dense_tail, sum_dtype

BLOCK = 1024  # classes per step: all of ImageNet's in one


def token_loss(
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    tail_classes: torch.Tensor | None,
    tail_offsets: torch.Tensor | None,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and logsumexp [B, T] of logits [B, T, C]; see `token_cross_entropy` for the arguments."""
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    batch, tokens, _ = logits.shape
    loss, lse = (logits.new_empty((batch, tokens), dtype=sum_dtype(logits)) for _ in range(2))
    arguments = _target_arguments(
        logits, classes, scores, background, smoothing, partner, tail_classes, tail_offsets, block
    )
    with torch.cuda.device_of(logits):
        _loss_kernel[(batch * tokens,)](logits, loss, lse, *logits.stride()[:2], **arguments)
    return loss, lse


def token_gradient(
    gradient: torch.Tensor,
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
    block: int = BLOCK,
) -> None:
    """Write the gradient of Σ gradient·loss with respect to the logits.

    Args:
        gradient: [B, T]: incoming gradient of each token's loss.
        logits: [B, T, C]; for these and the arguments below see `token_cross_entropy`.
        classes: [B, P].
        scores: [B, P, T].
        background: [B, T].
        smoothing: label smoothing.
        partner: [T], or None.
        tail_classes: [B, R], or None.
        tail_offsets: [B, R], or None.
        lse: [B, T]: from `token_loss`.
        out: [B, T, C], contiguous over the classes; may be the logits.
        block: classes per step.
    """
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    batch, tokens, _ = logits.shape
    arguments = _target_arguments(
        logits, classes, scores, background, smoothing, partner, tail_classes, tail_offsets, block
    )
    with torch.cuda.device_of(logits):
        _gradient_kernel[(batch * tokens,)](
            logits, out, gradient.contiguous(), lse, *logits.stride()[:2], *out.stride()[:2], **arguments
        )


def _target_arguments(
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    tail_classes: torch.Tensor | None,
    tail_offsets: torch.Tensor | None,
    block: int,
) -> dict[str, object]:
    (batch, tokens, count), places = logits.shape, classes.shape[1]
    weights = shifts = masses = background  # never read
    if tail_classes is not None and tail_offsets is not None:
        weights, shifts, masses = dense_tail(classes, tail_classes, tail_offsets, count, sum_dtype(logits))
    return {
        "classes": classes.contiguous(),
        "scores": scores.contiguous(),
        "background": background.contiguous(),
        "partner": classes if partner is None else partner.contiguous().view(torch.uint8),
        "weights": weights.contiguous(),
        "shifts": shifts,
        "masses": masses,
        "images": batch,
        "tokens": tokens,
        "count": count,
        "places": places,
        # Known when compiling, for a float that is passed later is rounded to float32.
        "OFF": smoothing / count,
        "ON": 1 - smoothing + smoothing / count,
        "TOTAL": 1 + smoothing / count,
        "MIXED": partner is not None,
        "TAIL": tail_classes is not None,
        "PLACES": max(16, triton.next_power_of_2(places)),
        "BLOCK": min(block, triton.next_power_of_2(count)),
        "SUM": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        "enable_fp_fusion": True,  # of multiply and add, which Triton 3.10 leaves off unless asked
    }


@triton.jit
def _target(  # type: ignore[no-untyped-def]
    classes, scores, background, partner, shifts, masses, image, token, images, tokens, count, places,
    OFF: tl.constexpr, ON: tl.constexpr, MIXED: tl.constexpr, TAIL: tl.constexpr, PLACES: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Palette ids, their extra beyond any other class, the part of every class, and the factor of a class's weight.

    target = rest + slope·(weight of the class in the image `source`, 0 without a tail) (+ extra)
    """
    source = image
    if MIXED:
        source = tl.where(tl.load(partner + token) != 0, images - 1 - image, image)
    place = tl.arange(0, PLACES)
    ids = tl.load(classes + source * places + place, mask=place < places, other=-1)
    used = ids >= 0
    score = tl.load(scores + (source * places + place) * tokens + token, mask=used, other=-float("inf")).to(SUM)
    other = tl.load(background + source * tokens + token).to(SUM)
    if TAIL:
        others = tl.load(masses + source)
        other += tl.load(shifts + source)
    else:
        others = count - tl.sum(used.to(tl.int32), 0)
    other = tl.where(others > 0, other, -float("inf"))
    top = tl.maximum(tl.max(score, 0), other)
    score, other = tl.exp(score - top), tl.exp(other - top)
    share = ON / (tl.sum(score, 0) + others * other)
    slope = share * other
    slope = tl.where(tl.max(ids, 0) >= count, float("nan"), slope)
    if TAIL:  # the palette's weights are 0
        extra, rest = share * score, tl.full((), OFF, SUM)
    else:
        extra, rest = share * (score - other), slope + OFF
    return ids, tl.where(used, extra, 0.0), rest, slope, source


@triton.jit
def _loss_kernel(  # type: ignore[no-untyped-def]
    logits, loss, lse, image_stride, token_stride, classes, scores, background, partner, weights, shifts, masses,
    images, tokens, count, places,
    OFF: tl.constexpr, ON: tl.constexpr, TOTAL: tl.constexpr, MIXED: tl.constexpr, TAIL: tl.constexpr,
    PLACES: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image, token = row // tokens, row % tokens
    logits += image * image_stride + token * token_stride
    ids, extra, rest, slope, source = _target(
        classes, scores, background, partner, shifts, masses, image, token, images, tokens, count, places,
        OFF, ON, MIXED, TAIL, PLACES, SUM,
    )  # fmt: skip
    at_ids = tl.load(logits + ids, mask=(ids >= 0) & (ids < count), other=0.0).to(SUM)
    top = tl.full((), -float("inf"), SUM)
    powers, spread = tl.zeros((), SUM), tl.zeros((), SUM)  # spread: Σ x · what every class has, or Σ x without a tail
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < count, other=-float("inf")).to(SUM)
        if TAIL:
            weight = tl.load(weights + source * count + column, mask=column < count, other=0.0)
            spread += tl.sum(tl.where(column < count, x * (rest + slope * weight), 0.0), 0)
        else:
            spread += tl.sum(tl.where(column < count, x, 0.0), 0)
        higher = tl.maximum(top, tl.max(x, 0))
        # While all logits were −inf, −inf − −inf would be NaN.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        powers = powers * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = higher
    normaliser = top + tl.log(powers)
    tl.store(lse + row, normaliser)
    if not TAIL:
        spread = rest * spread
    tl.store(loss + row, TOTAL * normaliser - spread - tl.sum(extra * at_ids, 0))


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits, out, gradient, lse, image_stride, token_stride, out_image_stride, out_token_stride, classes, scores,
    background, partner, weights, shifts, masses, images, tokens, count, places,
    OFF: tl.constexpr, ON: tl.constexpr, TOTAL: tl.constexpr, MIXED: tl.constexpr, TAIL: tl.constexpr,
    PLACES: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image, token = row // tokens, row % tokens
    logits += image * image_stride + token * token_stride
    out += image * out_image_stride + token * out_token_stride
    ids, extra, rest, slope, source = _target(
        classes, scores, background, partner, shifts, masses, image, token, images, tokens, count, places,
        OFF, ON, MIXED, TAIL, PLACES, SUM,
    )  # fmt: skip
    scale, normaliser = tl.load(gradient + row).to(SUM), tl.load(lse + row)
    in_palette = (ids >= 0) & (ids < count)
    at_ids = tl.load(logits + ids, mask=in_palette, other=0.0).to(SUM)
    at_ids = scale * (TOTAL * tl.exp(at_ids - normaliser) - rest - extra)
    # `out` may be the logits: all threads have read the palette's before any overwrites them, and all have written
    # every class before the palette's are set right.
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < count, other=0.0).to(SUM)
        if TAIL:
            weight = tl.load(weights + source * count + column, mask=column < count, other=0.0)
            every = rest + slope * weight
        else:
            every = rest
        x = scale * (TOTAL * tl.exp(x - normaliser) - every)
        tl.store(out + column, x.to(out.dtype.element_ty), mask=column < count)
    tl.debug_barrier()
    tl.store(out + ids, at_ids.to(out.dtype.element_ty), mask=in_palette)
