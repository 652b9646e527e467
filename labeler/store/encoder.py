"""Encodes teacher logits for a store: palettes of coded planes, a background and a tail.

Legend: B images; C classes; P palette size; R tail size; Q candidates, at least P; H×W map grid.

`choose_codes` decides which codes a map is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from labeler.store.choose_codes import MIN_P, choose_tail, codes_of, keep_first
from labeler.store.score_code import FLOOR, OFFSET_STEP, Encoding, ScoreCode

# Tokens average scores, which are logarithms. The mean log of what is left is below the log of its mean, so a slightly
# lower background is more accurate for tokens. The share of that gap, which is long where a teacher is certain:
TOWARDS_MEAN_LOG, LONGEST_GAP = 0.2, 1.0  # a share; nats
REFERENCE_TOP = 5  # classes per cell that the reference's files keep
REFERENCE_EVERY = 8  # images: every eighth is compared with the reference's files
# Cells of a fine map are much alike: what a byte must save hardly grows with their number.
RATE_POWER = 0.12
DENSE_ELEMENTS = 16_000_000  # of a copy that is dense over the classes: at most 64 MB, whatever the number of classes


@dataclass(frozen=True)
class EncodedMaps:
    """One batch as it is stored, with the errors of the encoding; arrays on the CPU.

    Attributes:
        classes: int64 [B, P], −1 where unused.
        scores: uint8 or float16 [B, P, H, W].
        background: uint8 or float16 [B, H, W].
        tail_classes: int64 [B, R], −1 where unused.
        tail_offsets: int8 [B, R], in quarter nats.
        kl: float32 [B]: mean over cells of KL(teacher ‖ store), nats.
        coverage: float32 [B]: mean probability of the classes with a code or in the tail.
        entropy: float32 [B]: mean entropy of the teacher's cells, nats.
        first_kept: float32 [B]: share of cells whose most probable class is still the first.
        reference_kl: float32 [B]: `kl` of the reference's files, five float16 logits per cell; NaN where not computed.
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
    """Encodes teacher logits, on their device.

    Args:
        logits: [B, C, H, W].
        encoding: Settings of the encoding.

    Returns:
        The encoded batch.
    """
    sizes = encoding.places(logits.shape[1])
    parts = []
    for chunk in logits.split(max(1, DENSE_ELEMENTS // logits[0].numel())):
        chunk = chunk.float()
        if encoding.precision == "float16":
            parts.append(_encode_planes(chunk, sizes[0], ScoreCode(None, False)))
        else:
            parts.append(_encode_sparse(chunk, sizes, encoding))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    compared = np.full(len(logits), np.nan, np.float32)
    compared[::REFERENCE_EVERY] = reference_kl(logits[::REFERENCE_EVERY].float()).cpu().numpy()
    return EncodedMaps(*[*columns, compared])


def encode_planes(logits: Tensor, palette: int, table: np.ndarray | None) -> EncodedMaps:
    """Encodes logits as dense planes of the P classes with the largest share, for float16 and format 1.0.

    Args:
        logits: [B, C, H, W].
        palette: P.
        table: float32 [256], descending: scores of the codes of format 1.0; None: float16.

    Returns:
        The encoded batch.
    """
    encoded = _encode_planes(logits.float(), palette, ScoreCode(table, as_background=False))
    columns = [column.cpu().numpy() for column in encoded]
    return EncodedMaps(*[*columns, reference_kl(logits.float()).cpu().numpy()])


def reference_kl(logits: Tensor) -> Tensor:
    """Returns [B]: mean over cells of KL(teacher ‖ reference's file), which keeps five float16 logits, all others 0."""
    log_p = logits.log_softmax(1)
    values, ids = logits.topk(min(REFERENCE_TOP, logits.shape[1]), dim=1)
    kept = torch.zeros_like(logits).scatter_(1, ids, values.half().float())
    return (log_p.exp() * (log_p - kept.log_softmax(1))).sum(1).mean((1, 2))


def _encode_sparse(logits: Tensor, sizes: tuple[int, int], encoding: Encoding) -> tuple[Tensor, ...]:
    """Encodes a chunk: the fields of `EncodedMaps` in their order, without the last; sizes: (P, R)."""
    (palette, tail), (_, num_classes, height, width) = sizes, logits.shape
    code, rate = ScoreCode.of_roots(encoding.levels), encoding.threshold * (height * width) ** RATE_POWER
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    information = p * log_p
    entropy = -information.sum(1)
    mass = p.sum((2, 3))
    # What a class could save if half of the probability were left to a uniform background.
    hope = information.sum((2, 3)) + mass * np.log(2 * num_classes)
    candidates = _top(hope, min(num_classes, 2 * palette))
    cells = candidates[:, :, None, None].expand(-1, -1, height, width)
    of_rest = p.scatter(1, cells, 0.0).sum(1)  # summed, since 1 − the candidates' sum would lose what is small
    p, log_candidates = p.gather(1, cells), log_p.gather(1, cells)

    codes, saved = codes_of(p, of_rest, num_classes - candidates.shape[1], code, rate, tail > 0)
    order = saved.sort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(saved, dtype=torch.bool).scatter_(1, order.indices[:, :palette], True) & (saved > 0)
    codes = keep_first(codes * chosen[:, :, None, None], p)
    coded = codes > 0

    left = of_rest + (p * ~coded).sum(1)
    mass = mass.scatter(1, candidates, (p * ~coded).sum((2, 3))).masked_fill(
        _scatter(chosen, candidates, num_classes), 0.0
    )
    uncoded = (num_classes - coded.sum(1)).float()
    tail_classes, offsets, background = choose_tail(mass, left, uncoded, tail, rate)
    used = tail_classes >= 0
    log_left = log_p.sum(1) - (log_candidates * coded).sum(1) - offsets.sum(1)[:, None, None]
    gap = background.clamp(min=MIN_P).log() - log_left / uncoded.clamp(min=1)
    lowered = background.clamp(min=MIN_P).log() - TOWARDS_MEAN_LOG * gap.clamp(0, LONGEST_GAP)
    stored_background, shared = code.background_codes(lowered)
    read = code.root_scores(codes)
    weight = uncoded + ((offsets.exp() - 1) * used).sum(1)[:, None, None]
    in_tail = log_p.gather(1, _spread(tail_classes.clamp(min=0), height, width)).exp() * _spread(used, height, width)
    cross = (p * read * coded).sum(1) + left * shared + (in_tail * offsets[:, :, None, None]).sum(1)
    cross -= _log_total(read, coded, shared, weight)
    kl = (-entropy - cross).mean((1, 2))
    coverage = 1 - (left - in_tail.sum(1)).mean((1, 2))
    first = _first_kept(log_p, read.masked_fill(~coded, -torch.inf), candidates, shared, tail_classes, offsets)

    # Ascending ids take fewer bytes than any other order, and the used slots of a palette come first.
    slots = torch.where(chosen, candidates, num_classes).sort(dim=1)
    slot_cells = _spread(slots.indices[:, :palette], height, width)
    classes = slots.values[:, :palette]
    stored = codes.gather(1, slot_cells).to(torch.uint8)
    return (
        classes.masked_fill(classes == num_classes, -1),
        stored,
        stored_background,
        tail_classes,
        (offsets / OFFSET_STEP).round().to(torch.int8),
        kl,
        coverage,
        entropy.mean((1, 2)),
        first,
    )


def _log_total(scores: Tensor, named: Tensor, shared: Tensor, others: Tensor) -> Tensor:
    """Returns [B, H, W]: log of the sum that a cell's softmax divides by.

    scores [B, Q, H, W], of which only `named` count; shared [B, H, W]: the background's score, which `others` share.
    """
    return ((scores.exp() * named).sum(1) + others * shared.exp()).log()


def _first_kept(
    log_p: Tensor, read: Tensor, classes: Tensor, background: Tensor, tail_classes: Tensor, offsets: Tensor
) -> Tensor:
    """Returns [B]: share of cells whose first class is the store's first. read [B, Q, H, W]: −inf where not coded."""
    best, slot = read.max(1)
    named = classes[:, :, None, None].expand_as(read).gather(1, slot[:, None])[:, 0]
    if tail_classes.shape[1]:
        highest, leader = offsets.masked_fill(tail_classes < 0, -torch.inf).max(1)
        by_tail = tail_classes.gather(1, leader[:, None])[:, :, None]
        named = torch.where(best >= background + highest[:, None, None], named, by_tail)
        best = torch.maximum(best, background + highest[:, None, None])
    kept = log_p.gather(1, named.clamp(min=0)[:, None])[:, 0] == log_p.amax(1)
    return (kept & (best > background)).float().mean((1, 2))


def _encode_planes(logits: Tensor, palette: int, code: ScoreCode) -> tuple[Tensor, ...]:
    """Encodes like `_encode_sparse`, with dense planes of the largest classes and no tail."""
    num_images, num_classes = logits.shape[:2]
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    order = _top(p.mean((2, 3)), min(palette, num_classes))
    cells = _spread(order, *logits.shape[2:])
    scores = log_p.gather(1, cells)
    used = scores.amax((2, 3)) > FLOOR
    visible = used[:, :, None, None]
    chosen_p = p.gather(1, cells) * visible
    # Summing what is left is exact; 1 − sum(chosen) is not, where the palette has almost everything.
    left = p.scatter(1, cells, p.gather(1, cells) * ~visible).sum(1)
    others = num_classes - used.sum(1)[:, None, None]
    background = (left / others.clamp(min=1)).log().clamp(min=FLOOR)

    scores = scores.clamp(min=FLOOR).masked_fill(~visible, FLOOR)
    stored, stored_background = code.nearest(scores), code.nearest(background)
    if code.values is not None:
        first = scores.argmax(1, keepdim=True)
        tied = (stored == stored.gather(1, first)).scatter(1, first, False)
        stored = torch.where(tied & (stored < len(code.values) - 1), stored + 1, stored)
    read, shared = code.decode(stored, stored_background)
    log_total = _log_total(read, visible, shared, others)
    kl = (-entropy - ((chosen_p * read).sum(1) + left * shared - log_total)).mean((1, 2))
    none = order.new_zeros(num_images, 0)
    first_kept = _first_kept(log_p, read.masked_fill(~visible, -torch.inf), order, shared, none, none)

    missing = palette - order.shape[1]  # if there are fewer classes than slots
    unused = code.nearest(scores.new_full((num_images, missing, *scores.shape[2:]), FLOOR))
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


def _top(values: Tensor, count: int) -> Tensor:
    """Returns int64 [B, count]: indices of the largest values [B, C]; ties go to the lower index, on every machine."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _spread(values: Tensor, height: int, width: int) -> Tensor:
    """Expands [B, K] to [B, K, H, W]."""
    return values[:, :, None, None].expand(-1, -1, height, width)


def _scatter(flags: Tensor, index: Tensor, count: int) -> Tensor:
    """Returns bool [B, count]: `flags` [B, K] at `index` [B, K], False elsewhere."""
    return torch.zeros(len(flags), count, dtype=torch.bool, device=flags.device).scatter_(1, index, flags)
