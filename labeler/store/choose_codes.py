"""Which codes and tail slots a map is worth.

Legend: B images; C classes; P palette size; R tail size; Q candidates, at least P; H×W map grid.

Every byte must pay for itself. Compared with counting a class as background b, its code for p in a cell saves
p·log(p / b) − (p − b) nats; the code is kept if that is more than its bytes cost at the rate of the settings. A class
enters the palette for the sum of what its codes save, and the tail for what one offset saves. The cost of codes, ids
and offsets after gzip was measured on maps of a real ImageNet teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from labeler.store.score_code import MAX_OFFSET, OFFSET_STEP, ScoreCode

CODE_BYTES, CLASS_BYTES, TAIL_BYTES = 0.8, 4.0, 1.4
# A code between codes costs less than one that interrupts a run of zeros; per neighbor along the row.
NEIGHBOUR = 0.6
# The first class of a cell is what users look at, and few bytes are enough for it: its code need only save this share
# of its price, and counts as if it saved so many bytes more for its class.
FIRST, FIRST_BYTES = 0.3, 4.0
MIN_P = 1e-12


def codes_of(
    p: Tensor, of_rest: Tensor, others: int, code: ScoreCode, rate: float, tail: bool
) -> tuple[Tensor, Tensor]:
    """Returns codes [B, Q, H, W] of candidates, 0 where a code does not pay, and what each class saves [B, Q].

    p [B, Q, H, W]: the candidates' probabilities; of_rest [B, H, W]: the probability of all `others`.
    """
    rounded = code.root_codes(p)
    worth = code.root_probabilities(rounded)
    log_worth = worth.clamp(min=MIN_P).log()
    coded = torch.zeros_like(rounded, dtype=torch.bool)
    first = torch.zeros_like(coded).scatter_(1, p.argmax(1, keepdim=True), True)
    price = torch.where(first, FIRST * rate * CODE_BYTES, rate * CODE_BYTES)
    needed = price
    # Which codes pay depends on the background, which depends on the codes: three rounds are enough.
    for last in (False, False, True):
        left = of_rest + (p * ~coded).sum(1)
        b = (left / (others + (~coded).sum(1)).clamp(min=1)).clamp(min=MIN_P)[:, None]
        gain = (p * (log_worth - b.log()) - (worth - b)).masked_fill(rounded == 0, -1.0)
        coded = gain > needed
        if not last:
            run = F.pad(coded.flatten(2).float(), (1, 1))
            beside = (run[:, :, :-2] + run[:, :, 2:]).view_as(p)
            needed = price * (1 + NEIGHBOUR * (1 - beside))
    saved = ((gain - price) * coded).sum((2, 3)) - rate * CLASS_BYTES
    saved += rate * FIRST_BYTES * (coded & first).sum((2, 3))
    if tail:  # if an offset for all cells would save as much, the class is better off in the tail
        _, in_tail = best_offsets(p.sum((2, 3)), b.sum((1, 2, 3))[:, None])
        saved -= (in_tail - rate * TAIL_BYTES).clamp(min=0)
    return rounded * coded, saved


def keep_first(codes: Tensor, p: Tensor) -> Tensor:
    """Lowers codes by a step where rounding has made them equal to that of the cell's first class."""
    first = p.argmax(1, keepdim=True)
    tied = (codes == codes.gather(1, first)).scatter(1, first, False)
    return (codes - tied.to(codes.dtype)).clamp(min=0)


def choose_tail(mass: Tensor, left: Tensor, uncoded: Tensor, tail: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tail classes [B, R], ascending (−1 unused), offsets in nats, and the background per class [B, H, W].

    mass [B, C]: each class's probability summed over the cells, 0 for those of the palette; left [B, H, W]: the
    probability that has no code; uncoded [B, H, W]: number of classes without a code.
    """
    background = left / uncoded.clamp(min=1)
    classes = mass.new_full((len(mass), tail), -1, dtype=torch.int64)
    offsets = mass.new_zeros(len(mass), tail)
    if not tail:
        return classes, offsets, background
    for _ in range(2):  # offsets and background depend on each other
        expected = background.sum((1, 2))[:, None].clamp(min=MIN_P)
        every, saved = best_offsets(mass, expected)
        saved = saved.masked_fill(mass == 0, 0.0)
        best = saved.sort(dim=1, descending=True, stable=True)
        kept = best.values[:, :tail] > rate * TAIL_BYTES
        num_classes = mass.shape[1]
        classes = torch.where(kept, best.indices[:, :tail], num_classes).sort(dim=1).values
        used = classes < num_classes
        offsets = every.gather(1, classes.clamp(max=num_classes - 1)) * used
        weight = uncoded + ((offsets.exp() - 1) * used).sum(1)[:, None, None]
        background = left / weight.clamp(min=MIN_P)
    return classes.masked_fill(~used, -1), offsets, background


def best_offsets(mass: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the offset of each class with `mass` [B, K] over a background of `expected` [B, 1], and what it saves."""
    steps = ((mass / expected).clamp(min=MIN_P).log() / OFFSET_STEP).round()
    offsets = (steps * OFFSET_STEP).clamp(-MAX_OFFSET, MAX_OFFSET)
    return offsets, mass * offsets - (offsets.exp() - 1) * expected
