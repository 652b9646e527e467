"""Decoded score maps: a palette of class planes, a background and a tail.

Legend: N images; C classes; P palette size; R tail size; H×W map grid.

A cell's teacher distribution is the softmax over its P palette scores `v_p`, R scores `b + o_r` of the tail and
C − P − R copies of the background score `b`. Unused palette and tail slots (class −1) are ignored: they
count neither as palette or tail nor among the other classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from labeler.base.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoreMaps:
    """Decoded label maps of N images, as numpy arrays or (after `to_torch`) as tensors.

    Attributes:
        classes: int64 [N, P]: class ids of the palette; −1 where a slot is unused.
        scores: float32 [N, P, H, W]: log-probabilities (or logits, in a `logit` store).
        background: float32 [N, H, W]: score of each class that is neither in the palette nor in the tail.
        region: float32 [N, 4]: y0, x0, y1, x1 of the part that the map covers, as fractions of the image; None: all.
        num_classes: C.
        tail_classes: int64 [N, R]: classes that share the background plane; −1 where unused; None: no tail.
        tail_offsets: float32 [N, R]: nats that such a class is above the background, in every cell.
    """

    classes: Any
    scores: Any
    background: Any
    region: Any = None
    num_classes: int = 0
    tail_classes: Any = None
    tail_offsets: Any = None

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise InputError("score maps need to know how many classes there are", remedy="Give num_classes.")
        if (self.tail_classes is None) != (self.tail_offsets is None):
            raise InputError("a tail needs classes and offsets", got="only one of them", expected="both, or neither")
        n = self.classes.shape[0]
        if self.region is None:
            object.__setattr__(self, "region", _like(self.scores, np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1))))
        if self.tail_classes is None:
            object.__setattr__(self, "tail_classes", _like(self.classes, np.zeros((n, 0), np.int64)))
            object.__setattr__(self, "tail_offsets", _like(self.scores, np.zeros((n, 0), np.float32)))

    def __len__(self) -> int:
        return self.classes.shape[0]

    def dense(self) -> Any:
        """Returns float32 [N, C, H, W]: each cell's distribution over all classes."""
        parts = self.classes, self.scores, self.background, self.tail_classes, self.tail_offsets
        return dense_shares(*parts, self.num_classes)

    def top1(self) -> np.ndarray:
        """Returns int64 [N, H, W]: the most probable class of each cell among those in the palette and the tail."""
        scores = np.where((self.classes >= 0)[:, :, None, None], self.scores, -np.inf)
        named, best = self.classes, scores
        if self.tail_classes.shape[1]:
            # The same tail class is ahead of all others in every cell.
            offsets = np.where(self.tail_classes >= 0, self.tail_offsets, -np.inf)
            leader = offsets.argmax(1)[:, None]
            named = np.concatenate([named, np.take_along_axis(self.tail_classes, leader, 1)], 1)
            leading = np.take_along_axis(offsets, leader, 1)[:, :, None, None] + self.background[:, None]
            best = np.concatenate([scores, leading], 1)
        slot = best.argmax(1)
        return np.take_along_axis(named[:, :, None, None], slot[:, None], axis=1)[:, 0]

    def to_torch(self, device: str | torch.device = "cpu") -> ScoreMaps:
        """Returns the same maps as tensors on `device`."""
        import torch

        moved = {
            name: torch.as_tensor(value, device=device) for name, value in vars(self).items() if name != "num_classes"
        }
        return ScoreMaps(num_classes=self.num_classes, **moved)


def dense_scores(
    classes: Any, scores: Any, background: Any, tail_classes: Any, tail_offsets: Any, num_classes: int
) -> Any:
    """Expands sparse scores to all classes: the plain reference for code that avoids doing so.

    All arguments are arrays, or all are tensors.

    Args:
        classes: [N, P].
        scores: [N, P, …].
        background: [N, …].
        tail_classes: [N, R].
        tail_offsets: [N, R].
        num_classes: C.

    Returns:
        Scores [N, C, …], of the arguments' type.
    """
    shape = (len(classes), num_classes, *background.shape[1:])
    if isinstance(scores, np.ndarray):
        logits = np.broadcast_to(background[:, None], shape).copy()
        (image, slot), (tail_image, tail_slot) = np.nonzero(classes >= 0), np.nonzero(tail_classes >= 0)
    else:
        logits = background[:, None].expand(shape).clone()
        image, slot = (classes >= 0).nonzero(as_tuple=True)
        tail_image, tail_slot = (tail_classes >= 0).nonzero(as_tuple=True)
    logits[tail_image, tail_classes[tail_image, tail_slot]] += tail_offsets[tail_image, tail_slot].reshape(
        -1, *[1] * (len(shape) - 2)
    )
    logits[image, classes[image, slot]] = scores[image, slot]
    return logits


def dense_shares(
    classes: Any, scores: Any, background: Any, tail_classes: Any, tail_offsets: Any, num_classes: int
) -> Any:
    """Returns the distributions [N, C, …] over all classes: the softmax of `dense_scores`, see there."""
    logits = dense_scores(classes, scores, background, tail_classes, tail_offsets, num_classes)
    if not isinstance(logits, np.ndarray):
        return logits.softmax(1)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class ClassShares:
    """The distributions of maps, without a plane for each of the C classes.

    Attributes:
        p: float32 [N, P, H, W]: probability of each palette class; 0 in unused slots and where it counts as background.
        tail: float32 [N, H, W]: probability of all tail classes together.
        left: float32 [N, H, W]: probability of all other classes together; p, tail and left sum to 1.
        shared: float32 [N, H, W]: probability of one class of the background.
        entropy: float32 [N, H, W]: in nats.
        confidence: float32 [N, H, W]: probability of the most probable class.
    """

    p: np.ndarray
    tail: np.ndarray
    left: np.ndarray
    shared: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray


def class_shares(maps: ScoreMaps, named: np.ndarray | None = None) -> ClassShares:
    """Takes the softmax of maps.

    Args:
        maps: Maps of N images, as arrays.
        named: bool [N, P, H, W]: where a palette class has a score of its own and does not count as background; None:
            in all used slots.

    Returns:
        The shares of the classes.
    """
    in_tail = maps.tail_classes >= 0
    if named is None:
        named = np.broadcast_to((maps.classes >= 0)[:, :, None, None], maps.scores.shape)
    others = maps.num_classes - named.sum(1) - in_tail.sum(1)[:, None, None]
    # Scores are relative to the cell's largest: logits could overflow.
    leader = np.where(in_tail, maps.tail_offsets, -np.inf).max(1, initial=-np.inf)[:, None, None]
    leader = np.maximum(leader, np.where(others > 0, 0, -np.inf))
    best = np.maximum(np.where(named, maps.scores, -np.inf).max(1), maps.background + leader)
    shared = np.exp(maps.background - best)
    p = np.where(named, np.exp(maps.scores - best[:, None]), 0)
    weights = np.where(in_tail, np.exp(maps.tail_offsets), 0)
    tail = shared * weights.sum(1)[:, None, None]
    left = shared * others
    total = p.sum(1) + tail + left
    # −Σ p·log p, where log p is the score minus log_total; a tail class's score is the background's plus its offset.
    log_total = best + np.log(total)
    offsets = (weights * maps.tail_offsets).sum(1)[:, None, None]
    scored = (p * np.where(named, maps.scores, 0)).sum(1) + (tail + left) * maps.background + shared * offsets
    shares = (p / total[:, None], tail / total, left / total, shared / total, log_total - scored / total, 1 / total)
    return ClassShares(*(share.astype(np.float32) for share in shares))


def _like(array: Any, values: np.ndarray) -> Any:
    """Converts `values` to the type of `array`: an array, or a tensor on the same device."""
    if isinstance(array, np.ndarray):
        return values
    import torch

    return torch.as_tensor(values, device=array.device)
