"""Mean IoU and pixel accuracy from a table of true and predicted classes.

Legend: C classes; H, W height and width of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from labeler.base.errors import InputError


@dataclass(frozen=True)
class SegmentationScore:
    """How well masks are predicted.

    Attributes:
        miou: mean over classes of intersection over union, without those that neither masks nor predictions have.
        pixel_accuracy: share of the labeled pixels whose class is right.
        images: number of images.
        iou: of each class; NaN for those that do not occur.
        pixels: of each class, the labeled pixels.
    """

    miou: float
    pixel_accuracy: float
    images: int
    iou: tuple[float, ...]
    pixels: tuple[int, ...]


def count_pixels(predicted: torch.Tensor, mask: torch.Tensor, classes: int, ignore_index: int) -> torch.Tensor:
    """Counts the pixels of each pair of classes.

    Args:
        predicted: int [H, W]: class ids.
        mask: int [H, W]: true ids.
        classes: C.
        ignore_index: id of pixels that do not count.

    Returns:
        int64 [C, C]: rows are true classes.
    """
    known = mask != ignore_index
    pairs = mask[known].long() * classes + predicted[known].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def score_of(table: np.ndarray, images: int) -> SegmentationScore:
    """The score of a table of counts.

    Args:
        table: int64 [C, C] from `count_pixels`, summed over images.
        images: how many.

    Returns:
        The score.

    Raises:
        InputError: no pixel is labeled.
    """
    right, true, answered = table.diagonal(), table.sum(1), table.sum(0)
    if not true.sum():
        raise InputError("no pixel of the evaluation's masks has a class", got=f"{images} images")
    union = true + answered - right
    with np.errstate(invalid="ignore"):
        iou = np.where(union > 0, right / np.maximum(union, 1), np.nan)
    return SegmentationScore(
        float(np.nanmean(iou)), float(right.sum() / true.sum()), images, tuple(iou.tolist()), tuple(true.tolist())
    )
