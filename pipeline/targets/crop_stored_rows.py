"""The label crop as the loader runs it: on a CPU one compiled pass from a store's rows to token targets.

Legend: B images; h×w token grid, T = h·w; P palette size; R tail size.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.compiled.available import kernels
from pipeline.geometry import Views, box_in_region, is_axis_aligned
from pipeline.targets.crop_score_maps import crop_score_maps
from pipeline.targets.token_targets import TokenTargets

if TYPE_CHECKING:
    from labeler.store.score_code import ScoreCode
    from labeler.store.stored_rows import StoredRows


def crop_stored_rows(
    rows: StoredRows, code: ScoreCode, num_classes: int, views: Views, grid: tuple[int, int]
) -> TokenTargets:
    """Crops rows of a store to the token grid.

    Rotated and sheared views, float16 scores, GPUs and machines without Numba take `decode_and_crop`, the twin.

    Args:
        rows: Rows of B images, as tensors.
        code: Meaning of the stored numbers.
        num_classes: C.
        views: Views of the images.
        grid: h, w.

    Returns:
        The targets.
    """
    coded = rows.scores.device.type == "cpu" and rows.scores.dtype == torch.uint8 and rows.background is not None
    compiled = kernels("crop_kernels") if coded else None
    upright = is_axis_aligned(views.affine)
    if compiled is None or not upright.any():
        return decode_and_crop(rows, code, num_classes, views, grid)
    planes = _crop_upright(compiled, rows, code, views, upright, grid)
    slanted = (~upright).nonzero()[:, 0].numpy()
    if len(slanted):
        some = Views(views.boxes[slanted], views.affine[slanted])
        found = decode_and_crop(rows.select(slanted), code, num_classes, some, grid)
        parts = found.token_scores, found.token_background, found.cls_scores, found.cls_background
        for plane, part in zip(planes, parts, strict=True):
            plane[slanted] = part
    offsets = code.decode_offsets(rows.tail_offsets)
    return TokenTargets(rows.classes, *planes, rows.tail_classes, offsets, grid, num_classes)


def decode_and_crop(
    rows: StoredRows, code: ScoreCode, num_classes: int, views: Views, grid: tuple[int, int]
) -> TokenTargets:
    """Decodes rows to maps, then crops these; see `crop_stored_rows`."""
    return crop_score_maps(rows.maps(code, num_classes), views.boxes, grid, affine=views.affine)


def _crop_upright(
    compiled: ModuleType, rows: StoredRows, code: ScoreCode, views: Views, upright: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token scores [B, P, T] and background [B, T], those of whole crops [B, P] and [B]; only upright rows' are set."""
    (n, palette), (h, w) = rows.scores.shape[:2], grid
    planes = torch.empty(n, palette, h * w), torch.empty(n, h * w), torch.empty(n, palette), torch.empty(n)
    boxes = box_in_region(views.boxes.double(), rows.region.double())
    inputs = rows.scores.numpy(), rows.background.numpy(), code.values, code.as_background
    geometry = np.ascontiguousarray(boxes), np.ascontiguousarray(views.affine.double())
    which, threads = upright.nonzero()[:, 0].numpy(), torch.get_num_threads()

    def crop(part: np.ndarray) -> None:
        compiled.crop_rows(*inputs, *geometry, part, h, w, *(plane.numpy() for plane in planes))

    if threads == 1:
        crop(which)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(crop, np.array_split(which, threads)))
    return planes
