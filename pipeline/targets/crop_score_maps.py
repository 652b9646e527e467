"""The label crop in torch's operators: on GPUs, for turned views and without Numba.

The loader's fast path on a CPU is `crop_stored_rows`, the plain reference `crop_reference`.

Legend: B images; C classes; P palette size; R tail size; H×W map grid; h×w token grid, T = h·w.

A target is the softmax over P palette scores, R scores of the tail (the background score plus an offset) and C − P − R
copies of the background score, for each token and for the whole crop. Scores are averaged over a token's area before
the softmax; a tail's offsets are the same all over the image, so cropping does not change them. Unused palette and tail
slots (class −1) are ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from labeler.base.errors import InputError
from labeler.base.runtime import on_device
from pipeline.geometry import (
    Views,
    apply_affine,
    axis_weights,
    bin_samples,
    box_in_region,
    compose,
    flips,
    identity,
    is_axis_aligned,
    sample_counts,
)
from pipeline.targets.token_targets import TokenTargets

if TYPE_CHECKING:
    from labeler.store.score_maps import ScoreMaps


def crop_score_maps(
    maps: ScoreMaps,
    boxes: torch.Tensor,
    grid: tuple[int, int],
    hflip: torch.Tensor | None = None,
    affine: torch.Tensor | None = None,
) -> TokenTargets:
    """Crops score maps to the token grid: adaptive ROI-align of scores.

    Parts of a crop outside of the map's region take the map's nearest cell.

    Args:
        maps: Maps of B images, as tensors (`ScoreMaps.to_torch`).
        boxes: [B, 4]: y0, x0, y1, x1 of the crops, as fractions of the images; float64, or float32 to compute in
            float32. They are used on the host, and so is the maps' region: if they are there, nothing waits for a GPU.
        grid: h, w.
        hflip: bool [B]: which crops are mirrored; None: none.
        affine: [B, 2, 3]: maps from input to crop before the flip, see `pipeline.geometry`; None: the identity. Tokens
            that show nothing of the crop take the target of its nearest point.

    Returns:
        The targets.

    Raises:
        InputError: There is not one box for each map.
    """
    if boxes.shape != (len(maps), 4):
        raise InputError("boxes do not fit the maps", got=tuple(boxes.shape), expected=(len(maps), 4))
    device, dtype = maps.scores.device, torch.float32 if boxes.dtype == torch.float32 else torch.float64
    # All that follows from the geometry alone is computed on the host: a few numbers an image, and no wait for a GPU.
    turned = identity(len(maps)) if affine is None else affine.to("cpu", torch.float64)
    if hflip is not None:
        turned = compose(flips(hflip.cpu()), turned)
    views = Views(box_in_region(boxes.to("cpu", dtype), maps.region.to("cpu", dtype)), turned)
    with torch.autocast(device.type, enabled=False):
        tokens, whole = _crop_planes(maps, views, grid)
    planes = tokens[:, :-1], tokens[:, -1], whole[:, :-1], whole[:, -1]
    return TokenTargets(maps.classes, *planes, maps.tail_classes, maps.tail_offsets, grid, maps.num_classes)


def _crop_planes(maps: ScoreMaps, views: Views, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens [B, P + 1, T] and whole crops [B, P + 1], background last.

    `views`: on the host, with the boxes as fractions of the map.
    """
    # Map rows first, so that the products run over whole matrices without a copy.
    planes = torch.cat([maps.scores.transpose(1, 2), maps.background[:, :, None]], 2)
    turned = views.affine
    tokens, whole = _crop_upright(planes, views, grid)
    slanted = (~is_axis_aligned(turned)).nonzero()[:, 0]
    if len(slanted):
        # In float64: an error of a millionth of the map is visible where scores are steep.
        some, index = Views(views.boxes[slanted].double(), turned[slanted]), on_device(slanted, planes.device)
        part = planes[index].transpose(1, 2).double()
        tokens[index] = _crop_slanted(part, some, grid).flatten(2).to(tokens.dtype)
        whole[index] = _crop_slanted(part, some, (1, 1))[:, :, 0, 0].to(tokens.dtype)
    return tokens, whole


def _crop_upright(planes: torch.Tensor, views: Views, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops planes [B, H, K, W] to tokens [B, K, T] and whole crops [B, K], ignoring rotation and shear.

    The whole crop is an extra row and column of the products, the mean of a 1×1 grid.
    """
    (h, w), affine, (n, rows, k, columns) = grid, views.affine.to(views.boxes.dtype), planes.shape
    y0, x0, y1, x1 = views.boxes.unbind(1)
    in_y = (y0, y1, affine[:, 0, 0], affine[:, 0, 2], rows)
    in_x = (x0, x1, affine[:, 1, 1], affine[:, 1, 2], columns)
    # On a GPU in float64, since float32 products may be TF32; these are small.
    work = torch.float64 if planes.is_cuda else planes.dtype
    along_y, along_x = (
        on_device(torch.cat([axis_weights(*along, bins), axis_weights(*along, 1)], 1).to(work), planes.device)
        for along, bins in ((in_y, h), (in_x, w))
    )
    cropped = along_y @ planes.reshape(n, rows, k * columns).to(work)
    cropped = (cropped.view(n, (h + 1) * k, columns) @ along_x.mT).view(n, h + 1, k, w + 1).to(planes.dtype)
    return cropped[:, :h, :, :w].transpose(1, 2).flatten(2), cropped[:, h, :, w].contiguous()


def _crop_slanted(planes: torch.Tensor, views: Views, grid: tuple[int, int]) -> torch.Tensor:
    """Crops planes [b, K, H, W] to [b, K, h, w] for rotated and sheared views, whose samples are not along the axes."""
    n, device = len(planes), planes.device
    extent = (views.boxes[:, 2:] - views.boxes[:, :2]) * torch.tensor(planes.shape[2:])
    whole = torch.ones_like(extent[:, 0])
    starts, inside, share_y = bin_samples(whole, sample_counts(extent[:, 0], grid[0]), grid[0])
    y = starts[:, :, None] + inside[:, None]
    starts, inside, share_x = bin_samples(whole, sample_counts(extent[:, 1], grid[1]), grid[1])
    x = starts[:, :, None] + inside[:, None]
    y, x, share_y, share_x = (on_device(part, device) for part in (y, x, share_y, share_x))
    boxes, affine = on_device(views.boxes, device), on_device(views.affine, device)
    (h, s), (w, r) = y.shape[1:], x.shape[1:]
    pairs = torch.stack(
        [y.reshape(n, h * s, 1).expand(-1, -1, w * r), x.reshape(n, 1, w * r).expand(-1, h * s, -1)], -1
    ).flatten(1, 2)
    in_crop = apply_affine(affine, pairs).clamp(0, 1)
    start, end = boxes[:, None, :2], boxes[:, None, 2:]
    points = (start + in_crop * (end - start)).view(n, h * s, w * r, 2)
    # grid_sample takes (x, y) in −1..1 and clamps to the outermost cell centers.
    samples = F.grid_sample(
        planes, points.flip(-1) * 2 - 1, mode="bilinear", padding_mode="border", align_corners=False
    ).view(n, -1, h, s, w, r)
    return torch.einsum("bkhswr,bs,br->bkhw", samples, share_y, share_x)
