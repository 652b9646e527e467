"""Split a batch into micro-batches that keep its pairs, so that their gradients add up to that of the whole batch.

Image b is mixed with image B−1−b. A part takes the same number of images from both ends, so each image's partner is in
the same part, at the same index counted from the other end.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from labeler.base.runtime import on_device
from pipeline.batch import Batch


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """Split a batch.

    Args:
        batch: the batch.
        size: most images of a part; None: do not split. For a mixed batch it must be 2 or more, and parts have an even
            number of images.

    Returns:
        The parts; their mean losses are weighted by their lengths.
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
    index = on_device(images, batch.images.device)
    return replace(
        batch,
        images=batch.images[index],
        targets=batch.targets.each(lambda part: part[index]),
        labels=batch.labels[index],
        keys=tuple(batch.keys[i] for i in images),
        rows=batch.rows[images],
        masks=None if batch.masks is None else batch.masks[index],
        views=replace(batch.views, boxes=batch.views.boxes[images], affine=batch.views.affine[images]),
    )
