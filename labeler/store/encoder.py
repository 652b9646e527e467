"""Teacher logits to what a store keeps of them: palettes of coded planes, a background and a tail.

Legend: B images; C classes; P palette size; R tail size; Q candidates, at least P; H×W map grid.

Every byte must earn its place. Against counting a class as background b, its code for p in a cell saves
p·log(p / b) − (p − b) nats there; it is kept where that is more than its bytes are worth at the setting's rate. A class
enters the palette for the sum of what its codes save, the tail for what one offset saves. What codes, ids and offsets
cost after gzip was measured on maps of a real ImageNet teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from labeler.store.score_code import BACKGROUND_STEP, FLOOR, MAX_OFFSET, OFFSET_STEP, Encoding

CODE_BYTES, CLASS_BYTES, TAIL_BYTES = 0.8, 4.0, 1.4
# A code between codes costs less than one that interrupts a run of zeros: per neighbour along the row.
NEIGHBOUR = 0.6
# The first class of a cell is what users look at, and few bytes keep it: its code need save only this share of its
# price, and counts as if it saved so many bytes more for its class.
FIRST, FIRST_BYTES = 0.3, 4.0
# Tokens average scores, which are logarithms; the mean log of what is left lies below the log of its mean, so that a
# background somewhat lower is truer of tokens. Of the gap, which may be long where a teacher is sure:
TOWARDS_MEAN_LOG, LONGEST_GAP = 0.2, 1.0  # a share; nats
REFERENCE_TOP = 5  # classes per cell that the reference's files keep
REFERENCE_EVERY = 8  # images: the comparison with the reference's files is made on each eighth
MIN_P = 1e-12
# Cells of a fine map say much the same: what a byte must save hardly grows with their number.
RATE_POWER = 0.12
DENSE_ELEMENTS = 16_000_000  # copies that are dense over the classes: keep each to 64 MB, whatever their number


@dataclass(frozen=True)
class EncodedMaps:
    """One batch as it is stored, with what the coding cost; arrays on the CPU.

    classes        int64 [B, P], −1 where unused
    scores         uint8 or float16 [B, P, H, W]
    background     likewise [B, H, W]
    tail_classes   int64 [B, R], −1 where unused
    tail_offsets   int8 [B, R], in quarter nats
    kl             float32 [B]: mean over cells of KL(teacher ‖ store), nats
    coverage       float32 [B]: probability that codes and the tail name
    entropy        float32 [B]: mean entropy of the teacher's cells, nats
    first_kept     float32 [B]: share of cells whose most probable class is still the first
    reference_kl   float32 [B]: `kl` of the reference's files, five float16 logits per cell; NaN where not computed
    """

    classes: np.ndarray
    scores: np.ndarray
    background: np.ndarray
    tail_classes: np.ndarray
    tail_offsets: np.ndarray
    kl: np.ndarray
    coverage: np.ndarray
    entropy: np.ndarray
    first_kept: np.ndarray
    reference_kl: np.ndarray


def encode_maps(logits: Tensor, encoding: Encoding) -> EncodedMaps:
    """Teacher logits [B, C, H, W] as a store with these settings keeps them; computed on the logits' device."""
    places = encoding.places(logits.shape[1])
    parts = []
    for chunk in logits.split(max(1, DENSE_ELEMENTS // logits[0].numel())):
        chunk = chunk.float()
        if encoding.precision == "float16":
            parts.append(_encode_planes(chunk, places[0], None))
        else:
            parts.append(_encode_sparse(chunk, places, encoding))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    compared = np.full(len(logits), np.nan, np.float32)
    compared[::REFERENCE_EVERY] = reference_kl(logits[::REFERENCE_EVERY].float()).cpu().numpy()
    return EncodedMaps(*[*columns, compared])


def encode_planes(logits: Tensor, palette: int, table: np.ndarray | None) -> EncodedMaps:
    """Logits [B, C, H, W] to P dense planes of the classes with the largest share: float16, and format 1.0.

    table  float32 [256], falling: codes of format 1.0; None: float16
    """
    values = None if table is None else torch.from_numpy(table).to(logits.device)
    columns = [column.cpu().numpy() for column in _encode_planes(logits.float(), palette, values)]
    return EncodedMaps(*[*columns, reference_kl(logits.float()).cpu().numpy()])


def reference_kl(logits: Tensor) -> Tensor:
    """[B]: mean over cells of KL(teacher ‖ the reference's file), which keeps five float16 logits, all others 0."""
    log_p = logits.log_softmax(1)
    values, ids = logits.topk(min(REFERENCE_TOP, logits.shape[1]), dim=1)
    kept = torch.zeros_like(logits).scatter_(1, ids, values.half().float())
    return (log_p.exp() * (log_p - kept.log_softmax(1))).sum(1).mean((1, 2))


def _encode_sparse(logits: Tensor, places: tuple[int, int], encoding: Encoding) -> tuple[Tensor, ...]:
    """Chunk of `encode_maps`, in the order of `EncodedMaps`'s fields without the last."""
    (palette, tail), (_, num_classes, height, width) = places, logits.shape
    rate = encoding.threshold * (height * width) ** RATE_POWER
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    information = p * log_p
    entropy = -information.sum(1)
    mass = p.sum((2, 3))
    # What a class could save, were half of the probability left to a background that is the same everywhere.
    hope = information.sum((2, 3)) + mass * np.log(2 * num_classes)
    found = _top(hope, min(num_classes, 2 * palette))
    cells = found[:, :, None, None].expand(-1, -1, height, width)
    of_rest = p.scatter(1, cells, 0.0).sum(1)  # summed, since 1 − the candidates' sum would lose what is small
    p, log_found = p.gather(1, cells), log_p.gather(1, cells)

    codes, saved = _codes_of(p, of_rest, num_classes - found.shape[1], encoding.levels, rate, tail > 0)
    order = saved.sort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(saved, dtype=torch.bool).scatter_(1, order.indices[:, :palette], True) & (saved > 0)
    codes = _keep_first(codes * chosen[:, :, None, None], p)
    coded = codes > 0

    left = of_rest + (p * ~coded).sum(1)
    mass = mass.scatter(1, found, (p * ~coded).sum((2, 3))).masked_fill(_scatter(chosen, found, num_classes), 0.0)
    uncoded = (num_classes - coded.sum(1)).float()
    tail_classes, offsets, background = _tail(mass, left, uncoded, tail, rate)
    used = tail_classes >= 0
    log_left = log_p.sum(1) - (log_found * coded).sum(1) - offsets.sum(1)[:, None, None]
    gap = background.clamp(min=MIN_P).log() - log_left / uncoded.clamp(min=1)
    lowered = background.clamp(min=MIN_P).log() - TOWARDS_MEAN_LOG * gap.clamp(0, LONGEST_GAP)
    steps = (-lowered / BACKGROUND_STEP).round().clamp(0, -FLOOR / BACKGROUND_STEP)

    read, shared = 2 * (codes.clamp(min=1) / encoding.levels).log(), -BACKGROUND_STEP * steps
    weight = uncoded + ((offsets.exp() - 1) * used).sum(1)[:, None, None]
    total = (read.exp() * coded).sum(1) + weight * shared.exp()
    in_tail = log_p.gather(1, _spread(tail_classes.clamp(min=0), height, width)).exp() * _spread(used, height, width)
    cross = (p * read * coded).sum(1) + left * shared + (in_tail * offsets[:, :, None, None]).sum(1) - total.log()
    kl = (-entropy - cross).mean((1, 2))
    coverage = 1 - (left - in_tail.sum(1)).mean((1, 2))
    first = _first_kept(log_p, read.masked_fill(~coded, -torch.inf), found, shared, tail_classes, offsets)

    # Ascending ids take fewer bytes than any other order, and all of a palette's used places stand in front.
    slots = torch.where(chosen, found, num_classes).sort(dim=1)
    slot_cells = _spread(slots.indices[:, :palette], height, width)
    classes = slots.values[:, :palette]
    stored = codes.gather(1, slot_cells).to(torch.uint8)
    return (
        classes.masked_fill(classes == num_classes, -1),
        stored,
        (steps + encoding.levels + 1).to(torch.uint8),
        tail_classes,
        (offsets / OFFSET_STEP).round().to(torch.int8),
        kl,
        coverage,
        entropy.mean((1, 2)),
        first,
    )


def _codes_of(p: Tensor, of_rest: Tensor, others: int, levels: int, rate: float, tail: bool) -> tuple[Tensor, Tensor]:
    """Codes [B, Q, H, W] of candidates, 0 where a code does not earn its bytes, and what each class saves [B, Q].

    p        [B, Q, H, W]: the candidates' probabilities
    of_rest  [B, H, W]: the probability of all `others`
    """
    rounded = (p.sqrt() * levels).round().clamp(max=levels)
    worth = (rounded / levels) ** 2
    log_worth = worth.clamp(min=MIN_P).log()
    coded = torch.zeros_like(rounded, dtype=torch.bool)
    first = torch.zeros_like(coded).scatter_(1, p.argmax(1, keepdim=True), True)
    price = torch.where(first, FIRST * rate * CODE_BYTES, rate * CODE_BYTES)
    needed = price
    # Which codes pay depends on the background, and the background on which are coded: three rounds settle it.
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
    if tail:  # where an offset for all cells would save as much, the class is better left to the tail
        _, in_tail = _offsets(p.sum((2, 3)), b.sum((1, 2, 3))[:, None])
        saved -= (in_tail - rate * TAIL_BYTES).clamp(min=0)
    return rounded * coded, saved


def _keep_first(codes: Tensor, p: Tensor) -> Tensor:
    """Lower by a step what rounding has tied with a cell's first class, where that is coded."""
    first = p.argmax(1, keepdim=True)
    tied = (codes == codes.gather(1, first)).scatter(1, first, False)
    return (codes - tied.to(codes.dtype)).clamp(min=0)


def _tail(mass: Tensor, left: Tensor, uncoded: Tensor, tail: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tail classes [B, R], ascending (−1 unused), their offsets in nats, and the background per class [B, H, W].

    mass     [B, C]: each class's probability summed over the cells, 0 for those of the palette
    left     [B, H, W]: the probability that is not coded; uncoded [B, H, W]: of how many classes
    """
    background = left / uncoded.clamp(min=1)
    classes = mass.new_full((len(mass), tail), -1, dtype=torch.int64)
    offsets = mass.new_zeros(len(mass), tail)
    if not tail:
        return classes, offsets, background
    for _ in range(2):  # offsets depend on the background, and it on the offsets
        expected = background.sum((1, 2))[:, None].clamp(min=MIN_P)
        every, saved = _offsets(mass, expected)
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


def _offsets(mass: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The offset of each class that has `mass` [B, K] where the background has `expected` [B, 1], and what it saves."""
    steps = ((mass / expected).clamp(min=MIN_P).log() / OFFSET_STEP).round()
    offsets = (steps * OFFSET_STEP).clamp(-MAX_OFFSET, MAX_OFFSET)
    return offsets, mass * offsets - (offsets.exp() - 1) * expected


def _first_kept(
    log_p: Tensor, read: Tensor, found: Tensor, background: Tensor, tail_classes: Tensor, offsets: Tensor
) -> Tensor:
    """[B]: share of cells whose first class is the store's first. read [B, Q, H, W]: −inf where not coded."""
    best, place = read.max(1)
    named = found[:, :, None, None].expand_as(read).gather(1, place[:, None])[:, 0]
    if tail_classes.shape[1]:
        highest, leader = offsets.masked_fill(tail_classes < 0, -torch.inf).max(1)
        by_tail = tail_classes.gather(1, leader[:, None])[:, :, None]
        named = torch.where(best >= background + highest[:, None, None], named, by_tail)
        best = torch.maximum(best, background + highest[:, None, None])
    kept = log_p.gather(1, named.clamp(min=0)[:, None])[:, 0] == log_p.amax(1)
    return (kept & (best > background)).float().mean((1, 2))


def _encode_planes(logits: Tensor, palette: int, table: Tensor | None) -> tuple[Tensor, ...]:
    """As `_encode_sparse`, with dense planes of the largest classes and no tail."""
    num_images, num_classes = logits.shape[:2]
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    order = _top(p.mean((2, 3)), min(palette, num_classes))
    cells = _spread(order, *logits.shape[2:])
    scores = log_p.gather(1, cells)
    used = scores.amax((2, 3)) > FLOOR
    shown = used[:, :, None, None]
    chosen_p = p.gather(1, cells) * shown
    # Summing what is left loses nothing; 1 − sum(chosen) would, where the palette holds almost everything.
    left = p.scatter(1, cells, p.gather(1, cells) * ~shown).sum(1)
    others = num_classes - used.sum(1)[:, None, None]
    background = (left / others.clamp(min=1)).log().clamp(min=FLOOR)

    scores = scores.clamp(min=FLOOR).masked_fill(~shown, FLOOR)
    stored, stored_background = _quantise(scores, table), _quantise(background, table)
    if table is not None:
        first = scores.argmax(1, keepdim=True)
        tied = (stored == stored.gather(1, first)).scatter(1, first, False)
        stored = torch.where(tied & (stored < len(table) - 1), stored + 1, stored)
    read, shared = ((s.float() if table is None else table[s.long()]) for s in (stored, stored_background))
    total = (read.exp() * shown).sum(1) + others * shared.exp()
    kl = (-entropy - ((chosen_p * read).sum(1) + left * shared - total.log())).mean((1, 2))
    none = order.new_zeros(num_images, 0)
    first_kept = _first_kept(log_p, read.masked_fill(~shown, -torch.inf), order, shared, none, none)

    missing = palette - order.shape[1]  # where there are fewer classes than places
    unused = _quantise(scores.new_full((num_images, missing, *scores.shape[2:]), FLOOR), table)
    return (
        F.pad(order.masked_fill(~used, -1), (0, missing), value=-1),
        torch.cat([stored, unused], 1),
        stored_background,
        none,
        none.to(torch.int8),
        kl,
        1 - left.mean((1, 2)),
        entropy.mean((1, 2)),
        first_kept,
    )


def _quantise(scores: Tensor, table: Tensor | None) -> Tensor:
    """Scores to the nearest code of a falling table, or to float16."""
    if table is None:
        return scores.half()
    # Codes that repeat the floor are never written: the first of them stands for all.
    codes = int((table > table[-1]).sum()) + 1
    midpoints = -(table[1:codes] + table[: codes - 1]) / 2
    return torch.bucketize(-scores, midpoints).to(torch.uint8)


def _top(values: Tensor, count: int) -> Tensor:
    """int64 [B, count]: places of the largest values [B, C]; ties go to the lower place, on every machine."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _spread(places: Tensor, height: int, width: int) -> Tensor:
    """[B, K] as [B, K, H, W]."""
    return places[:, :, None, None].expand(-1, -1, height, width)


def _scatter(flags: Tensor, places: Tensor, count: int) -> Tensor:
    """bool [B, count]: `flags` [B, K] at their `places` [B, K]."""
    return torch.zeros(len(flags), count, dtype=torch.bool, device=flags.device).scatter_(1, places, flags)
