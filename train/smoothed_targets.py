"""Smoothed targets of tokens as the closed-form loss needs them: sparse over the classes, a few images at a time.

Legend: B images; C classes; P palette size; T tokens; n images of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

# Logits that the CPU takes at a time: few enough to stay in its cache from one operation to the next, enough for the
# operations' own cost not to count. The targets of so many such parts are reckoned together.
PART, PARTS = 1 << 21, 2


class SmoothedTarget(NamedTuple):
    """Targets of n images' tokens: every class has `rest`, the palette's `extra` beyond it; `total` is their sum, S."""

    ids: torch.Tensor  # int64 [n, T, P], 0 where a place is unused: it has no extra
    extra: torch.Tensor  # [n, T, P]
    rest: torch.Tensor  # [n, T]
    total: torch.Tensor  # [n, T]

    def subtracted(self, weight: torch.Tensor) -> SmoothedTarget:
        """Weighted, and the palette's part with the sign that it has in a gradient."""
        weight = weight.to(self.rest.dtype)
        return SmoothedTarget(self.ids, self.extra * -weight[..., None], self.rest * weight, self.total * weight)


def smoothed_target(
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    images: slice,
    count: int,
    dtype: torch.dtype,
) -> SmoothedTarget:
    own = _own_target(classes[images], scores[images], background[images], smoothing, count, dtype)
    if partner is None:
        return own
    batch = len(classes)
    others = slice(batch - images.stop, batch - images.start)  # backwards they are the partners, B−1−b of b
    other = _own_target(classes[others], scores[others], background[others], smoothing, count, dtype)
    inside = partner[:, None]
    ids, extra = (torch.where(inside, b.flip(0), a) for a, b in zip(own[:2], other[:2], strict=True))
    return SmoothedTarget(ids, extra, torch.where(partner, other.rest.flip(0), own.rest), own.total)


def _own_target(
    classes: torch.Tensor, v: torch.Tensor, b: torch.Tensor, smoothing: float, count: int, dtype: torch.dtype
) -> SmoothedTarget:
    off = smoothing / count
    on = 1 - smoothing + off
    unused = classes[..., None] < 0
    left = count - classes.shape[1] + unused.sum(1)
    # With every class in the palette the background is nobody's score, and may be far above all.
    v, b = v.to(dtype).masked_fill(unused, -math.inf), b.to(dtype).masked_fill(left <= 0, -math.inf)
    top = torch.maximum(v.amax(1), b)
    v, b = v.sub_(top[:, None]).exp_(), b.sub_(top).exp_()
    share = on / (v.sum(1) + left * b)
    extra = v.sub_(b[:, None]).mul_(share[:, None]).masked_fill_(unused, 0)
    ids = classes.clamp(min=0)[:, None].expand_as(extra.mT)
    return SmoothedTarget(ids, extra.mT, share * b + off, torch.full_like(b, on + count * off))


def blocks(logits: torch.Tensor) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Images whose targets are reckoned together, and their parts: images of the batch, and where they are in theirs.

    A part is as many images as have `PART` logits, or one.
    """
    batch, tokens, count = logits.shape
    step = max(1, PART // (tokens * count))
    for start in range(0, batch, PARTS * step):
        stop = min(start + PARTS * step, batch)
        firsts = range(start, stop, step)
        parts = [(slice(i, min(i + step, stop)), slice(i - start, min(i + step, stop) - start)) for i in firsts]
        yield slice(start, stop), parts


def sum_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
