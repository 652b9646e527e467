"""Masks cropped, flipped and turned together with their images: each pixel gets the class at its place in the image.

Legend: B images; S input side; H, W height and width of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.geometry import Views, apply_affine, is_axis_aligned

# A point this close to the edge of two pixels, in pixels, is in the later one, as for Pillow, however it was rounded.
ROUNDING = 1e-6


def crop_masks(masks: Sequence[np.ndarray], views: Views, side: int, ignore_index: int) -> torch.Tensor:
    """Crops masks as `views` show their images. Upright views take rows and columns; others go pixel by pixel.

    Args:
        masks: uint8 [H, W] each.
        views: The part of its image that each input shows.
        side: S.
        ignore_index: What pixels beside the crop get.

    Returns:
        uint8 [B, S, S].
    """
    out = torch.empty(len(masks), side, side, dtype=torch.uint8, device="cpu")
    upright = is_axis_aligned(views.affine)
    for b, mask in enumerate(masks):
        view = Views(views.boxes[b : b + 1], views.affine[b : b + 1])
        if not upright[b]:
            out[b] = crop_mask(mask, view, side, ignore_index)
            continue
        centers = _centers(side)
        rows, columns = (_places(view, torch.stack([centers, centers], -1), mask)[:, axis] for axis in (0, 1))
        cropped = torch.from_numpy(mask)[rows.clamp(min=0)][:, columns.clamp(min=0)]
        cropped[rows < 0] = ignore_index
        cropped[:, columns < 0] = ignore_index
        out[b] = cropped
    return out


def crop_mask(mask: np.ndarray, view: Views, side: int, ignore_index: int) -> torch.Tensor:
    """Crops one mask pixel by pixel, for any view of one image: the plain twin of `crop_masks`."""
    centers = _centers(side)
    points = torch.stack(torch.meshgrid(centers, centers, indexing="ij"), -1).view(-1, 2)
    places = _places(view, points, mask)
    beside = (places < 0).any(1)
    places = places.clamp(min=0)
    ids = torch.from_numpy(mask)[places[:, 0], places[:, 1]]
    ids[beside] = ignore_index
    return ids.view(side, side)


def _centers(side: int) -> torch.Tensor:
    """The centers of pixels, as fractions."""
    return (torch.arange(side, dtype=torch.float64, device="cpu") + 0.5) / side


def _places(view: Views, points: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """int64 [K, 2]: row and column of the image at points [K, 2] of the input; −1 where the input shows no image.

    Beside the crop there is none, as an image is cropped before it is turned.
    """
    size = torch.tensor(mask.shape, dtype=torch.float64, device="cpu")
    in_crop = apply_affine(view.affine, points[None])[0]
    places = (view.to_image(points[None])[0] * size + ROUNDING).floor().long().clamp(min=0)
    shown = (in_crop >= 0) & (in_crop < 1)
    return torch.where(shown, torch.minimum(places, size.long() - 1), -1)
