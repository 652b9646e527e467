"""Where things are: boxes, regions, affine maps, and ROI-align as two small matrices per sample.

Legend: B images; H×W map grid; h×w token grid.

One convention everywhere. A box is (y0, x0, y1, x1) as fractions of the **decoded** image, half-open. Grid cells are
areas and are sampled at their centres (torch's align_corners=False). An affine map A [2, 3] takes a place (y, x) of the
network's input, as fractions of its sides, to the place of the unflipped crop that is shown there:
(y', x') = A · (y, x, 1). Places of the input that show nothing of the crop have y' or x' outside 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# ROI-align takes ceil(cells per bin) samples. A whole number that rounding has lifted by this much is still itself.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Views:
    """What each input of a batch shows of its image.

    boxes   float64 [B, 4]: the crop, as fractions of the decoded image
    affine  float64 [B, 2, 3]: input -> crop, see the top of this file; a flip is part of it
    """

    boxes: torch.Tensor
    affine: torch.Tensor

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def to_image(self, places: torch.Tensor) -> torch.Tensor:
        """Places [B, K, 2] (y, x) of the inputs to places of the images, both as fractions."""
        start, end = self.boxes[:, None, :2], self.boxes[:, None, 2:]
        return start + apply_affine(self.affine, places) * (end - start)


def identity(n: int) -> torch.Tensor:
    """float64 [n, 2, 3]: the affine map that changes nothing."""
    return torch.eye(2, 3, dtype=torch.float64, device="cpu").repeat(n, 1, 1)


def flips(hflip: torch.Tensor) -> torch.Tensor:
    """float64 [B, 2, 3]: x' = 1 − x where `hflip` (bool [B]), else the identity."""
    affine = identity(len(hflip)).to(hflip.device)
    affine[hflip, 1, 1] = -1.0
    affine[hflip, 1, 2] = 1.0
    return affine


def compose(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """[B, 2, 3]: first `inner`, then `outer`."""
    linear = outer[..., :2] @ inner[..., :2]
    shift = outer[..., :2] @ inner[..., 2:] + outer[..., 2:]
    return torch.cat([linear, shift], -1)


def apply_affine(affine: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Affine maps [B, 2, 3] of places [B, K, 2] (y, x)."""
    return places @ affine[:, :, :2].mT + affine[:, None, :, 2]


def is_axis_aligned(affine: torch.Tensor) -> torch.Tensor:
    """bool [B]: neither rotates nor shears."""
    return (affine[:, 0, 1] == 0) & (affine[:, 1, 0] == 0)


def box_in_region(boxes: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Boxes [B, 4] of the image as fractions of the regions [B, 4] that their maps cover; may leave 0..1."""
    origin, extent = region[:, :2].repeat(1, 2), (region[:, 2:] - region[:, :2]).repeat(1, 2)
    return (boxes - origin) / extent


def sample_counts(cells: torch.Tensor, bins: int) -> torch.Tensor:
    """int64 [B]: samples per bin and axis where `bins` bins share `cells` [B] cells, as ROI-align chooses it."""
    return (cells / bins - ROUNDING).ceil().clamp(min=1).long()


def bin_samples(
    extent: torch.Tensor, counts: torch.Tensor, bins: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An axis of length `extent` [B], cut into bins with `counts` [B] samples each.

    Returns where the bins start [B, bins], how far into its bin each sample lies [B, S], and its weight in the bin's
    mean [B, S]. S is the largest count; the samples that an image does not need have weight 0.
    """
    size = (extent / bins)[:, None]
    k = torch.arange(int(counts.max()), device=extent.device)
    starts = torch.arange(bins, device=extent.device) * size
    used = k < counts[:, None]
    return starts, (k + 0.5) * size / counts[:, None], used / counts[:, None].to(extent.dtype)


def axis_weights(
    start: torch.Tensor, end: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor, cells: int, bins: int
) -> torch.Tensor:
    """[B, bins, cells], of the boxes' type: ROI-align along one axis, out = weights · map.

    start, end   [B]: the crop as fractions of the map's axis
    gain, shift  [B]: input -> crop along this axis; the parts that show nothing take the crop's nearest place
    """
    # In cells, where 0 is the centre of the first one. In float32 this order of operations is torchvision's.
    low, high = start * cells - 0.5, end * cells - 0.5
    extent = high - low
    starts, inside, share = bin_samples(extent, sample_counts(extent, bins), bins)
    origin = (low + shift * extent)[:, None, None]
    centres = origin + gain[:, None, None] * starts[:, :, None] + gain[:, None, None] * inside[:, None]
    centres = torch.minimum(torch.maximum(centres, low[:, None, None]), high[:, None, None])
    # Bilinear interpolation is a hat function around each cell's centre; beyond the outermost centres the map is flat.
    distance = centres.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=start.device)
    return torch.einsum("bnsc,bs->bnc", (1 - distance.abs()).clamp(min=0), share)
