"""Smoothed token targets for the closed-form loss: sparse over the classes, a few images at a time.

Legend: B images; C classes; P palette size; R tail size; T tokens; n images of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

# Logits that the CPU works on at a time: few enough to stay in its cache from one operation to the next, enough to
# hide the overhead of each operation. The targets of PARTS such parts are computed together.
PART, PARTS = 1 << 21, 2


class Tail(NamedTuple):
    """Weights of the classes outside each image's palette: the score of such a class is b + shift + log(weight)."""

    weights: torch.Tensor  # [B, C], at most 1, and 0 for the palette's
    shift: torch.Tensor  # [B]: the highest offset, so that no power of it overflows
    mass: torch.Tensor  # [B]: sum of the weights


class Spread(NamedTuple):
    """The part that every class has, as Σ_k factors[k]·rows[k]: K products of a token and a class part."""

    factors: torch.Tensor  # [n, K, T]
    rows: torch.Tensor  # [n, K, C]


class SmoothedTarget(NamedTuple):
    """Token targets of n images: a part that every class has, the palette's `extra` beyond it, and the sum S."""

    ids: torch.Tensor  # int64 [n, T, P], 0 for unused slots, whose extra is 0
    extra: torch.Tensor  # [n, T, P]
    rest: torch.Tensor  # [n, T]: the part that every class has, without a tail
    total: torch.Tensor  # S [n, T]
    spread: Spread | None = None  # the part that every class has, with a tail

    def subtracted(self, weight: torch.Tensor) -> SmoothedTarget:
        """The target times `weight` [n, T], and `extra` with the sign that it has in the gradient."""
        w = weight.to(self.rest.dtype)
        spread = None if self.spread is None else Spread(self.spread.factors * w[:, None], self.spread.rows)
        # Contiguous for each token, as logits are gathered and gradients scattered.
        extra = torch.mul(self.extra, -w[..., None], out=self.extra.new_empty(self.extra.shape))
        return SmoothedTarget(self.ids, extra, self.rest * w, self.total * w, spread)

    def dot_spread(self, x: torch.Tensor, within: slice) -> torch.Tensor:
        """[i, T]: logits [i, T, C] of the images `within`, times the part that every class has, summed over C."""
        if self.spread is None:
            return x.sum(2).mul_(self.rest[within])
        # Autocast would round the logits to half precision for the product.
        with torch.autocast(x.device.type, enabled=False):
            dots = torch.bmm(self.spread.rows[within], x.mT)
        return dots.mul_(self.spread.factors[within]).sum(1)

    def subtract_spread(self, x: torch.Tensor, within: slice) -> torch.Tensor:
        """Subtract the part that every class has from `x` [i, T, C] of the images `within`, in place."""
        if self.spread is None:
            return x.sub_(self.rest[within, :, None])
        with torch.autocast(x.device.type, enabled=False):
            return x.baddbmm_(self.spread.factors[within].mT, self.spread.rows[within], alpha=-1)


def dense_tail(
    classes: torch.Tensor, tail_classes: torch.Tensor, tail_offsets: torch.Tensor, count: int, dtype: torch.dtype
) -> Tail:
    """The weights of all classes outside the palette.

    Args:
        classes: int64 [B, P], −1 for unused slots.
        tail_classes: int64 [B, R], −1 for unused slots.
        tail_offsets: [B, R].
        count: number of classes C.
        dtype: of the result.

    Returns:
        The tail. A class id of `count` or above makes its image's mass NaN: raising an error would wait for the GPU.
    """
    # One more column than there are classes takes unused slots and class ids that do not exist.
    offsets = torch.zeros(len(classes), count + 1, dtype=dtype, device=classes.device)
    tail_columns, columns = (ids.masked_fill((ids < 0) | (ids >= count), count) for ids in (tail_classes, classes))
    offsets = offsets.scatter_(1, tail_columns, tail_offsets.to(dtype)).scatter_(1, columns, -math.inf)[:, :count]
    highest = offsets.amax(1)
    shift = highest.masked_fill(highest == -math.inf, 0)
    weights = (offsets - shift[:, None]).exp_()
    unknown = torch.maximum(classes.amax(1), tail_classes.amax(1)) >= count
    return Tail(weights, shift, weights.sum(1).masked_fill(unknown, math.nan))


def smoothed_target(
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    tail: Tail | None,
    images: slice,
    count: int,
    dtype: torch.dtype,
) -> SmoothedTarget:
    """The smoothed token targets of some images.

    Args:
        classes: int64 [B, P], −1 for unused slots.
        scores: [B, P, T].
        background: [B, T].
        smoothing: label smoothing.
        partner: bool [T]: tokens whose target is the partner's; None: no token.
        tail: from `dense_tail`; None: no tail.
        images: which of the batch.
        count: number of classes C.
        dtype: of the result.

    Returns:
        The targets of the images in `images`.
    """
    batch, off = len(classes), smoothing / count
    on = 1 - smoothing + off
    others = slice(batch - images.stop, batch - images.start)  # reversed, these are the partners: B−1−b for b
    ids, extra, rest = _own_target(classes, scores, background, on, tail, images, count, dtype)
    if partner is not None:
        other = _own_target(classes, scores, background, on, tail, others, count, dtype)
        ids, extra = (torch.where(partner[:, None], b.flip(0), a) for a, b in ((ids, other[0]), (extra, other[1])))
        rest = torch.where(partner, other[2].flip(0), rest)
    total, spread = torch.full_like(rest, on + count * off), None
    if tail is not None:
        factors, rows = [rest], [tail.weights[images]]
        if partner is not None:
            factors = [rest.masked_fill(partner, 0), rest.masked_fill(~partner, 0)]
            rows.append(tail.weights[others].flip(0))
        factors.append(torch.full_like(rest, off))
        spread = Spread(torch.stack(factors, 1), torch.stack([*rows, torch.ones_like(rows[0])], 1))
    return SmoothedTarget(ids, extra, rest + off, total, spread)


def _own_target(
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    on: float,
    tail: Tail | None,
    images: slice,
    count: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The palette's ids and extra [n, T, P], and the share [n, T] of every other class (per weight, with a tail)."""
    classes, v, b = classes[images], scores[images], background[images].to(dtype)
    unused = classes[..., None] < 0
    if tail is None:
        mass = count - classes.shape[1] + unused.sum(1)
    else:
        mass, b = tail.mass[images, None], b + tail.shift[images, None]
    # If every class is in the palette, the background score belongs to no class and may be far above all others.
    v, b = v.to(dtype).masked_fill(unused, -math.inf), b.masked_fill(mass <= 0, -math.inf)
    top = torch.maximum(v.amax(1), b)
    v, b = v.sub_(top[:, None]).exp_(), b.sub_(top).exp_()
    share = on / (v.sum(1) + mass * b)
    if tail is None:  # with one the palette's weights are 0
        v = v.sub_(b[:, None]).masked_fill_(unused, 0)
    ids, extra = classes.clamp(min=0)[:, None], v.mul_(share[:, None]).mT
    return ids.expand_as(extra), extra, share * b


def blocks(logits: torch.Tensor) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Split a batch into blocks, whose targets are computed together, and each block into parts.

    A part has as many images as fit into `PART` logits, at least one.

    Args:
        logits: [B, T, C].

    Yields:
        A block, as a slice of the batch, and its parts, as slices of the batch and of the block.
    """
    batch, tokens, count = logits.shape
    step = max(1, PART // (tokens * count))
    for start in range(0, batch, PARTS * step):
        stop = min(start + PARTS * step, batch)
        firsts = range(start, stop, step)
        parts = [(slice(i, min(i + step, stop)), slice(i - start, min(i + step, stop) - start)) for i in firsts]
        yield slice(start, stop), parts


def sum_dtype(logits: torch.Tensor) -> torch.dtype:
    """The dtype of sums over these logits: float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
