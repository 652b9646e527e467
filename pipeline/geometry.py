"""Geometry: boxes, regions, affine maps, and ROI-align as two small matrices per image.

Legend: B images; H×W map grid; h×w token grid.

One convention everywhere. A box is (y0, x0, y1, x1) as fractions of the **decoded** image, half-open. Grid cells are
areas and are sampled at their centers (torch's align_corners=False). An affine map A [2, 3] maps a point (y, x) of the
network's input, as fractions of its sides, to the point of the unflipped crop that is visible there:
(y', x') = A · (y, x, 1). Points of the input that show nothing of the crop have y' or x' outside of 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# ROI-align takes ceil(cells per bin) samples. A whole number that rounding raised by up to this much is not rounded up.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Views:
    """The part of its image that each input of a batch shows.

    Attributes:
        boxes: float64 [B, 4]: the crops, as fractions of the decoded images.
        affine: float64 [B, 2, 3]: affine maps from input to crop, see the top of this file; they include flips.
    """

    boxes: torch.Tensor
    affine: torch.Tensor

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def to_image(self, points: torch.Tensor) -> torch.Tensor:
        """Maps points [B, K, 2] (y, x) of the inputs to points of the images, both as fractions."""
        start, end = self.boxes[:, None, :2], self.boxes[:, None, 2:]
        return start + apply_affine(self.affine, points) * (end - start)


def identity(n: int) -> torch.Tensor:
    """Returns float64 [n, 2, 3]: identity maps."""
    return torch.eye(2, 3, dtype=torch.float64, device="cpu").repeat(n, 1, 1)


def flips(hflip: torch.Tensor) -> torch.Tensor:
    """Returns float64 [B, 2, 3]: x' = 1 − x where `hflip` (bool [B]) is set, otherwise the identity."""
    affine = identity(len(hflip)).to(hflip.device)
    affine[hflip, 1, 1] = -1.0
    affine[hflip, 1, 2] = 1.0
    return affine


def compose(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Returns [B, 2, 3]: the affine maps that apply `inner` [B, 2, 3] first, then `outer` [B, 2, 3]."""
    linear = outer[..., :2] @ inner[..., :2]
    shift = outer[..., :2] @ inner[..., 2:] + outer[..., 2:]
    return torch.cat([linear, shift], -1)


def apply_affine(affine: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Applies affine maps [B, 2, 3] to points [B, K, 2] (y, x)."""
    return points @ affine[:, :, :2].mT + affine[:, None, :, 2]


def is_axis_aligned(affine: torch.Tensor) -> torch.Tensor:
    """Returns bool [B]: which maps neither rotate nor shear."""
    return (affine[:, 0, 1] == 0) & (affine[:, 1, 0] == 0)


def box_in_region(boxes: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Converts boxes [B, 4] of the images to fractions of the regions [B, 4] of their maps; they may leave 0..1."""
    origin, extent = region[:, :2].repeat(1, 2), (region[:, 2:] - region[:, :2]).repeat(1, 2)
    return (boxes - origin) / extent


def sample_counts(cells: torch.Tensor, bins: int) -> torch.Tensor:
    """Returns int64 [B]: samples per bin and axis if `bins` bins share `cells` [B] cells, as ROI-align does it."""
    return (cells / bins - ROUNDING).ceil().clamp(min=1).long()


def bin_samples(
    extent: torch.Tensor, counts: torch.Tensor, bins: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Divides axes into bins of equally spaced samples.

    Args:
        extent: [B]: lengths of the axes.
        counts: int64 [B]: samples per bin.
        bins: Number of bins.

    Returns:
        The start of each bin [B, bins], the offset of each sample in its bin [B, S], and its weight in the bin's mean
        [B, S]. S is the largest count; samples that an image does not need have weight 0.
    """
    size = (extent / bins)[:, None]
    k = torch.arange(int(counts.max()), device=extent.device)
    starts = torch.arange(bins, device=extent.device) * size
    used = k < counts[:, None]
    return starts, (k + 0.5) * size / counts[:, None], used / counts[:, None].to(extent.dtype)


def axis_weights(
    start: torch.Tensor, end: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor, cells: int, bins: int
) -> torch.Tensor:
    """Computes ROI-align along one axis as a matrix: out = weights · map.

    Args:
        start: [B]: start of the crop, as a fraction of the map's axis.
        end: [B]: end of the crop.
        gain: [B]: scale of the map from input to crop along this axis.
        shift: [B]: its shift. Parts of the input that show nothing take the nearest point of the crop.
        cells: Cells of the map along this axis.
        bins: Tokens along this axis.

    Returns:
        [B, bins, cells], of the boxes' type.
    """
    # In cells, where 0 is the center of the first. In float32 this is the order of operations of torchvision.
    low, high = start * cells - 0.5, end * cells - 0.5
    extent = high - low
    starts, inside, share = bin_samples(extent, sample_counts(extent, bins), bins)
    origin = (low + shift * extent)[:, None, None]
    centers = origin + gain[:, None, None] * starts[:, :, None] + gain[:, None, None] * inside[:, None]
    centers = torch.minimum(torch.maximum(centers, low[:, None, None]), high[:, None, None])
    # Bilinear interpolation is a hat function around each cell's center; the map is flat beyond the outermost centers.
    distance = centers.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=start.device)
    return torch.einsum("bnsc,bs->bnc", (1 - distance.abs()).clamp(min=0), share)
