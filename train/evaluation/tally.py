"""Accuracy of each class, and confusions between classes.

Legend: B images; C classes; n images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from train.ranks.distributed import Ranks

NONE, SEVERAL = -1, -2  # instead of the true class


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy of one class.

    Attributes:
        id: class id.
        name: its name.
        images: number of images of this class.
        top1: share of them for which it is the most probable class.
        top5: share of them for which it is among the five most probable ones.
    """

    id: int
    name: str
    images: int
    top1: float
    top5: float


@dataclass(frozen=True)
class Confusion:
    """How often one class was taken for another.

    Attributes:
        id: id of the true class.
        name: its name.
        taken_for_id: id of the predicted class.
        taken_for: its name.
        images: number of images.
    """

    id: int
    name: str
    taken_for_id: int
    taken_for: str
    images: int


@dataclass
class Tally:
    """Collects for each image the true class, the predicted one, and whether the true one is in the top 5."""

    _rows: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits: torch.Tensor, right: torch.Tensor) -> None:
        """Add a batch.

        Args:
            logits: [B, C].
            right: bool [B, C]: the right classes; images with several or none belong to no class.
        """
        first = logits.topk(min(5, logits.shape[1])).indices
        count = right.sum(1)
        true = torch.where(count == 1, right.int().argmax(1), torch.where(count == 0, NONE, SEVERAL))
        self._rows.append(torch.stack([true, first[:, 0], right.gather(1, first).any(1)], 1))

    def merged(self, ranks: Ranks) -> np.ndarray:
        """Rows of the images of all ranks, int64 [n, 3]: true class, predicted class, whether in the top 5."""
        own = torch.cat([torch.zeros(0, 3, dtype=torch.int64, device=ranks.device), *self._rows])
        return np.concatenate(ranks.gather(own.cpu().numpy()))


def class_accuracies(rows: np.ndarray, name: Callable[[int], str]) -> tuple[ClassAccuracy, ...]:
    """The accuracy of each class.

    Args:
        rows: from `Tally.merged`.
        name: class id -> name.

    Returns:
        Each class that has images, the worst first; of equal ones, that with more images first.
    """
    accuracies = []
    for c in np.unique(rows[:, 0]).tolist():
        if c >= 0:
            _, answer, five = rows[rows[:, 0] == c].T
            accuracies.append(ClassAccuracy(c, name(c), len(answer), float((answer == c).mean()), float(five.mean())))
    return tuple(sorted(accuracies, key=lambda one: (one.top1, one.top5, -one.images, one.id)))


def confusions(rows: np.ndarray, name: Callable[[int], str]) -> tuple[Confusion, ...]:
    """Count the confusions between classes.

    Args:
        rows: from `Tally.merged`.
        name: class id -> name.

    Returns:
        Every pair of true class and wrong prediction that occurs, the most frequent first.
    """
    wrong = rows[(rows[:, 0] >= 0) & (rows[:, 0] != rows[:, 1])]
    pairs, counts = np.unique(wrong[:, :2], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return tuple(
        Confusion(true, name(true), answer, name(answer), count)
        for (true, answer), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    )
