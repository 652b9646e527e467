"""Random erasing: replaces a rectangle of an input with noise (Zhong et al., 2017), drawn as in timm.

Legend: B images; S input side.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from labeler.base.runtime import on_device

AREA = (0.02, 1 / 3)
ASPECT = (0.3, 1 / 0.3)
ATTEMPTS = 10


def draw_erased(n: int, side: int, prob: float, rng: np.random.Generator) -> np.ndarray:
    """Draws the boxes to erase.

    Args:
        n: B.
        side: S.
        prob: Probability of erasing.
        rng: Random number generator.

    Returns:
        int64 [B, 4]: y0, x0, y1, x1 in pixels of the input; an empty box where nothing is erased.
    """
    chosen = rng.random(n) < prob
    area = side * side * rng.uniform(*AREA, (n, ATTEMPTS))
    aspect = np.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1]), (n, ATTEMPTS)))
    position = rng.random((n, 2))
    shapes = np.rint(np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], -1)).astype(np.int64)
    fits = (shapes < side).all(-1)
    shape = shapes[np.arange(n), fits.argmax(1)]
    shape[~(chosen & fits.any(1))] = 0
    corner = np.floor(position * (side - shape + 1)).astype(np.int64)
    return np.concatenate([corner, corner + shape], 1)


def erase(images: torch.Tensor, boxes: np.ndarray, mode: str, generator: torch.Generator) -> torch.Tensor:
    """Erases boxes of images, in place.

    Args:
        images: Normalized float images [B, 3, S, S].
        boxes: int64 [B, 4]: y0, x0, y1, x1 in pixels; empty: nothing is erased.
        mode: "pixel": normal noise for every pixel; "const": zero, the mean color.
        generator: Random number generator of the images' device.

    Returns:
        The same images.
    """
    areas = 3 * (boxes[:, 2:] - boxes[:, :2]).prod(1)
    if mode == "const":
        noise = torch.zeros(int(areas.sum()), dtype=images.dtype, device=images.device)
    else:
        noise = torch.randn(int(areas.sum()), dtype=images.dtype, device=images.device, generator=generator)
    return (fill_boxes if images.device.type == "cpu" else fill_boxes_at_once)(images, boxes, noise)


def fill_boxes(images: torch.Tensor, boxes: np.ndarray, values: torch.Tensor) -> torch.Tensor:
    """Fills boxes of images one by one, in place.

    Args:
        images: [B, 3, S, S].
        boxes: int64 [B, 4].
        values: The new pixels, [3, height, width] of each box in turn.

    Returns:
        The same images.
    """
    areas = 3 * (boxes[:, 2:] - boxes[:, :2]).prod(1)
    parts = values.split(areas.tolist())
    for i in np.nonzero(areas)[0].tolist():
        y0, x0, y1, x1 = boxes[i].tolist()
        images[i, :, y0:y1, x0:x1] = parts[i].view(3, y1 - y0, x1 - x0)
    return images


def fill_boxes_at_once(images: torch.Tensor, boxes: np.ndarray, values: torch.Tensor) -> torch.Tensor:
    """Does what `fill_boxes` does in a dozen operations however many boxes there are, each of which a GPU has to start.

    Arguments and result are those of `fill_boxes`.
    """
    side, areas = images.shape[-1], (boxes[:, 2:] - boxes[:, :2]).prod(1)
    chosen = np.nonzero(areas)[0]
    counts = 3 * areas[chosen]
    columns = (chosen, boxes[chosen, 0], boxes[chosen, 1], (boxes[:, 3] - boxes[:, 1])[chosen], areas[chosen],
               np.cumsum(counts) - counts)  # fmt: skip
    of_box = on_device(np.stack(columns, 1), images.device)
    box = torch.repeat_interleave(of_box, on_device(counts, images.device), 0, output_size=int(counts.sum()))
    image, y0, x0, width, area, first = box.unbind(1)
    place = torch.arange(len(box), device=images.device) - first  # in its box: channel, row, column
    channel, inside = place // area, place % area
    y, x = y0 + inside // width, x0 + inside % width
    images.view(-1)[((image * 3 + channel) * side + y) * side + x] = values
    return images
