"""A batch in parts that keep its pairs, so that parts one after the other give the whole batch's gradient.

Image b mixes with image B−1−b. A part takes images from both ends alike, so each image's partner is in its part, at the
same place counted from the other end.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import torch

from pipeline.batch import Batch
from pipeline.labels.targets import TokenTargets


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """Parts of at most `size` images; None: the batch itself. Their means count by their lengths.

    Where images mix, parts hold an even number, so that `size` is 2 or more.
    """
    if size is None or size >= len(batch):
        return [batch]
    count = len(batch)
    if batch.mix is None:
        return [_part(batch, np.arange(start, min(start + size, count))) for start in range(0, count, size)]
    half = max(1, size // 2)
    starts = range(0, (count + 1) // 2, half)
    return [_part(batch, _pairs(count, start, min(start + half, (count + 1) // 2))) for start in starts]


def _pairs(count: int, start: int, stop: int) -> np.ndarray:
    """Images start … stop−1 and their partners, in the batch's order; the middle image is its own partner."""
    front = np.arange(start, stop)
    back = count - 1 - front[::-1]
    return np.concatenate([front, back[back >= stop]])


def _part(batch: Batch, images: np.ndarray) -> Batch:
    index = torch.from_numpy(images).to(batch.images.device)
    targets = TokenTargets(*(getattr(batch.targets, field.name)[index] for field in fields(TokenTargets)))
    return replace(
        batch,
        images=batch.images[index],
        targets=targets,
        labels=batch.labels[index],
        keys=tuple(batch.keys[i] for i in images),
        rows=batch.rows[images],
        views=replace(batch.views, boxes=batch.views.boxes[images], affine=batch.views.affine[images]),
    )
