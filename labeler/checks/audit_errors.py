"""The errors of some rows of a store, for the audit: the teacher runs on the images, mirrored images and crops.

Legend: n images; C classes; P palette size; H×W map grid.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from labeler.base.errors import IntegrityError
from labeler.sources.decoding.pixels import open_rgb
from labeler.sources.decoding.resize import resize
from labeler.store.encoder import reference_kl
from labeler.store.label_store import LabelStore
from labeler.store.score_maps import ScoreMaps, dense_scores
from labeler.teacher.create_teacher import LoadedTeacher

if TYPE_CHECKING:
    from torch import Tensor

    from labeler.sources.decoding.decoder import Decoder

Window = tuple[int, int, int, int]


def errors_of(
    labels: LabelStore,
    files: dict[int, bytes],
    teacher: LoadedTeacher,
    decoder: Decoder,
    seed: int,
    shares: tuple[float, ...],
) -> tuple[np.ndarray, Tensor]:
    """Measures the errors of rows.

    Args:
        labels: The store.
        files: row -> bytes of its image file.
        teacher: The store's teacher.
        decoder: The teacher's decoder.
        seed: Seed of the crops.
        shares: Shares of the sides that crops keep.

    Returns:
        float64 [n, 4 + shares]: storage, reference, mirror, mirror to the average, each crop; and the teacher's maps
        [n, C, H, W].

    Raises:
        IntegrityError: An image can no longer be decoded.
    """
    decoded = decoder(list(files.values()))
    if decoded.failures:
        row = list(files)[next(iter(decoded.failures))]
        raise IntegrityError("an image can no longer be decoded", got=labels.keys[row])
    single = LoadedTeacher(teacher.dense, dataclasses.replace(teacher.info, flip=False), teacher.device)
    first = single.label(decoded.pixels).cpu()
    second = single.label(decoded.pixels.flip(2)).flip(-1).cpu()
    average = (first + second) / 2
    own = average if teacher.info.flip else first
    maps = labels.read(list(files)).to_torch()
    stored = dense_scores(
        maps.classes, maps.scores, maps.background, maps.tail_classes, maps.tail_offsets, maps.num_classes
    )
    columns = [kl(own, stored), reference_kl(own).double(), kl(first, second), kl(first, average)]
    images = [open_image(data, labels.meta.orientation) for data in files.values()]
    draws = [np.random.default_rng([seed, row]) for row in files]
    for share in shares:
        windows = random_windows(images, maps.region.tolist(), share, draws)
        columns.append(kl(crop_outputs(teacher, images, windows), crop_scores(maps, fractions(windows, images))))
    return torch.stack(columns, 1).numpy(), own


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Returns float64 [n]: KL(softmax p ‖ softmax q) of logits [n, C, …], mean over locations."""
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).reshape(len(p), -1).mean(1)


def open_image(data: bytes, orientation: str) -> np.ndarray:
    """Decodes an image file to uint8 [height, width, 3]."""
    return np.array(open_rgb(data, orientation))


def random_windows(
    images: list[np.ndarray], regions: list[list[float]], share: float, draws: list[np.random.Generator]
) -> list[Window]:
    """Returns a random crop of each image, y0, x0, y1, x1 in pixels, with `share` of the sides of its map's region."""
    windows = []
    for image, region, draw in zip(images, regions, draws, strict=True):
        edges = []
        for length, low, high in zip(image.shape[:2], region[:2], region[2:], strict=True):
            extent = share * (high - low) * length
            start = low * length + draw.random() * ((high - low) * length - extent)
            side = max(1, min(length, round(extent)))
            edges.append((min(max(0, round(start)), length - side), side))
        (y, height), (x, width) = edges
        windows.append((y, x, y + height, x + width))
    return windows


def fractions(windows: list[Window], images: list[np.ndarray]) -> Tensor:
    """Returns float64 [n, 4]: windows in pixels as fractions of their images."""
    sizes = [[*image.shape[:2], *image.shape[:2]] for image in images]
    return torch.tensor(windows, dtype=torch.float64) / torch.tensor(sizes)


def crop_outputs(teacher: LoadedTeacher, images: list[np.ndarray], windows: list[Window]) -> Tensor:
    """Returns float32 [n, C]: the mean of the teacher's map of each crop, resized to the teacher's input size."""
    side, method = teacher.info.input_size, teacher.info.interpolation
    crops = [
        resize(np.ascontiguousarray(image[y0:y1, x0:x1]), side, method)
        for image, (y0, x0, y1, x1) in zip(images, windows, strict=True)
    ]
    return teacher.label(torch.from_numpy(np.stack(crops))).mean((2, 3)).cpu()


def crop_scores(maps: ScoreMaps, boxes: Tensor) -> Tensor:
    """Returns float64 [n, C]: the stored scores of all classes, averaged over boxes [n, 4], fractions of the image.

    Cells are weighted by the part of them that the box covers. Boxes are clipped to the map's region.
    """
    origin, extent = maps.region[:, :2].repeat(1, 2), (maps.region[:, 2:] - maps.region[:, :2]).repeat(1, 2)
    y0, x0, y1, x1 = ((boxes - origin) / extent).clamp(0, 1).double().unbind(1)
    along_y, along_x = _overlaps(y0, y1, maps.scores.shape[2]), _overlaps(x0, x1, maps.scores.shape[3])
    scores = torch.einsum("nphw,nh,nw->np", maps.scores.double(), along_y, along_x)
    background = torch.einsum("nhw,nh,nw->n", maps.background.double(), along_y, along_x)
    offsets = maps.tail_offsets.double()
    return dense_scores(maps.classes, scores, background, maps.tail_classes, offsets, maps.num_classes)


def _overlaps(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Returns [n, cells]: the share of the span `low` to `high` [n] of an axis that is in each cell."""
    edges = torch.arange(cells + 1, dtype=torch.float64)[None] / cells
    inside = torch.minimum(torch.maximum(edges, low[:, None]), high[:, None])
    return inside.diff(dim=1) / (high - low)[:, None].clamp(min=1e-12)
