"""The label crop, one image at a time and sample by sample: the readable twin of `crop_score_maps`.

Legend: B images; P palette size; H×W map grid; h×w token grid, T = h·w.
"""

from __future__ import annotations

import numpy as np
import torch

from labeler.store.score_maps import ScoreMaps
from pipeline.geometry import Views, sample_counts
from pipeline.targets.token_targets import TokenTargets


def crop_one_by_one(maps: ScoreMaps, views: Views, grid: tuple[int, int]) -> TokenTargets:
    """Crops score maps to the token grid, one image at a time.

    Args:
        maps: Maps of B images, as tensors.
        views: Views of the images.
        grid: h, w.

    Returns:
        The targets.
    """
    tokens, whole = [], []
    for b in range(len(maps)):
        planes = torch.cat([maps.scores[b], maps.background[b][None]]).double().numpy()
        box, region, affine = views.boxes[b].numpy(), maps.region[b].double().numpy(), views.affine[b].numpy()
        tokens.append(_crop(planes, box, region, affine, grid).reshape(len(planes), -1))
        whole.append(_crop(planes, box, region, affine, (1, 1))[:, 0, 0])
    token, cls = (torch.from_numpy(np.stack(part)).float() for part in (tokens, whole))
    scores = token[:, :-1], token[:, -1], cls[:, :-1], cls[:, -1]
    return TokenTargets(maps.classes, *scores, maps.tail_classes, maps.tail_offsets, grid, maps.num_classes)


def _crop(
    planes: np.ndarray, box: np.ndarray, region: np.ndarray, affine: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Crops planes [P, H, W] to [P, h, w]: the mean of each token's samples."""
    cells = np.array(planes.shape[1:])
    origin, extent = region[:2], region[2:] - region[:2]
    crop_cells = (box[2:] - box[:2]) / extent * cells
    counts = [int(sample_counts(torch.tensor([c], device="cpu"), n)[0]) for c, n in zip(crop_cells, grid, strict=True)]
    # Every token is divided into counts[0]×counts[1] equal parts; their centers are its samples.
    ys, xs = ((np.arange(n * c) + 0.5) / (n * c) for n, c in zip(grid, counts, strict=True))
    y, x = np.meshgrid(ys, xs, indexing="ij")
    in_crop = np.stack([y, x, np.ones_like(y)], -1).reshape(-1, 3) @ affine.T
    in_image = box[:2] + in_crop.clip(0, 1) * (box[2:] - box[:2])
    in_map = (in_image - origin) / extent * cells - 0.5  # 0 is the center of the first cell
    samples = _interpolate(planes, in_map.clip(0, cells - 1))
    return samples.reshape(len(planes), grid[0], counts[0], grid[1], counts[1]).mean((2, 4))


def _interpolate(planes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Interpolates planes [P, H, W] at points [K, 2], in cells; returns [P, K]."""
    low = np.floor(points).astype(int)
    high = np.minimum(low + 1, np.array(planes.shape[1:]) - 1)
    (fy, fx), (y0, x0), (y1, x1) = (points - low).T, low.T, high.T
    upper = planes[:, y0, x0] * (1 - fx) + planes[:, y0, x1] * fx
    lower = planes[:, y1, x0] * (1 - fx) + planes[:, y1, x1] * fx
    return upper * (1 - fy) + lower * fy
