"""Which classes an evaluation gets right, and which it takes for which others.

Legend: B images; C classes; n images that this rank saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from train.ranks.distributed import Ranks

NONE, SEVERAL = -1, -2  # in place of the true class


@dataclass(frozen=True)
class ClassAccuracy:
    """top1, top5: shares of the `images` of this class whose answer names it at first, or among the first five."""

    id: int
    name: str
    images: int
    top1: float
    top5: float


@dataclass(frozen=True)
class Confusion:
    """So many images of a class were taken for another."""

    id: int
    name: str
    taken_for_id: int
    taken_for: str
    images: int


@dataclass
class Tally:
    """True class, answer, and whether the true one is among the first five, for each image; merged over ranks."""

    _seen: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits: torch.Tensor, right: torch.Tensor) -> None:
        """right  bool [B, C]: which classes are true; images of several or none belong to no class."""
        first = logits.topk(min(5, logits.shape[1])).indices
        count = right.sum(1)
        true = torch.where(count == 1, right.int().argmax(1), torch.where(count == 0, NONE, SEVERAL))
        self._seen.append(torch.stack([true, first[:, 0], right.gather(1, first).any(1)], 1))

    def merged(self, ranks: Ranks) -> np.ndarray:
        """int64 [n, 3]: the images of all ranks."""
        own = torch.cat([torch.zeros(0, 3, dtype=torch.int64, device=ranks.device), *self._seen])
        return np.concatenate(ranks.gather(own.cpu().numpy()))


def class_accuracies(seen: np.ndarray, name: Callable[[int], str]) -> tuple[ClassAccuracy, ...]:
    """Of each class that has images, the worst first; of equals that with more images."""
    found = []
    for c in np.unique(seen[:, 0]).tolist():
        if c >= 0:
            _, answer, five = seen[seen[:, 0] == c].T
            found.append(ClassAccuracy(c, name(c), len(answer), float((answer == c).mean()), float(five.mean())))
    return tuple(sorted(found, key=lambda one: (one.top1, one.top5, -one.images, one.id)))


def confusions(seen: np.ndarray, name: Callable[[int], str]) -> tuple[Confusion, ...]:
    """Every pair of true class and wrong answer that occurs, the most frequent first."""
    wrong = seen[(seen[:, 0] >= 0) & (seen[:, 0] != seen[:, 1])]
    pairs, counts = np.unique(wrong[:, :2], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return tuple(
        Confusion(true, name(true), answer, name(answer), count)
        for (true, answer), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    )
