"""Augments a batch of byte images on any device, each image with its own operation and amount.

Legend: B, b images; S input side.

Rounding follows PIL, which the tests compare with: tables, blends and warps truncate, filters round.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from labeler.base.runtime import on_device
from pipeline.augment import policy
from pipeline.geometry import apply_affine

# ITU-R 601-2 luma in 16-bit fixed point, with PIL's weights.
LUMA = (19595, 38470, 7471)
SOLARIZE_ADD_BELOW = 128
BLUR_PASSES = 3


def apply_kernels(images: torch.Tensor, kernels: np.ndarray, amounts: np.ndarray) -> torch.Tensor:
    """Applies augmentation kernels, in place.

    Args:
        images: uint8 [B, 3, S, S].
        kernels: int64 [B, K]: kernels of each image, applied one column after the other.
        amounts: [B, K]: their amounts.

    Returns:
        The same images.
    """
    for column, amount in zip(kernels.T, amounts.T, strict=True):
        for kernel in np.unique(column):
            if kernel == policy.KEEP:
                continue
            chosen = np.nonzero(column == kernel)[0]
            index = on_device(chosen, images.device)
            values = torch.from_numpy(amount[chosen]).float()[:, None, None, None]
            if kernel != policy.BLUR:  # whose filter is made on the host, since its size depends on the amounts
                values = on_device(values, images.device)
            images[index] = KERNELS[int(kernel)](images[index], values)
    return images


def warp(images: torch.Tensor, affine: torch.Tensor, fill: tuple[int, ...]) -> torch.Tensor:
    """Warps images by affine maps, with bilinear interpolation.

    Args:
        images: uint8 [b, 3, S, S].
        affine: [b, 2, 3]: maps from input to crop.
        fill: Color, 0 to 255, of pixels that show nothing of the crop.

    Returns:
        uint8 [b, 3, S, S].
    """
    side = images.shape[-1]
    centers = (torch.arange(side, device=images.device, dtype=torch.float64) + 0.5) / side
    points = torch.cartesian_prod(centers, centers)[None]
    crop = apply_affine(on_device(affine, images.device), points.expand(len(images), -1, -1)).view(-1, side, side, 2)
    outside = ((crop < 0) | (crop >= 1)).any(-1)[:, None]
    background = on_device(torch.tensor(fill, dtype=torch.uint8), images.device)[None, :, None, None]
    grid = (crop.flip(-1) * 2 - 1).float()
    warped = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Truncated as in PIL; four weights in float32 may add up to a little less than 1.
    return torch.where(outside, background, (warped + 1e-3).to(torch.uint8))


def _truncate(values: torch.Tensor) -> torch.Tensor:
    """Converts float to uint8 like PIL's blends: clamp and truncate."""
    return values.clamp(0, 255).to(torch.uint8)


def _blend(base: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Computes base + factor · (images − base)."""
    base = base.float()
    return _truncate(base + factor * (images.float() - base))


def _luma(images: torch.Tensor) -> torch.Tensor:
    """Converts RGB, uint8 [b, 3, S, S], to luma, int32 [b, 1, S, S]."""
    red, green, blue = images.to(torch.int32).split(1, 1)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + 0x8000) >> 16


def _look_up(tables: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Looks up the bytes of each image and channel in its table [b, 3, 256]."""
    return tables.gather(2, images.flatten(2).long()).view_as(images).to(torch.uint8)


def _autocontrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    flat = images.flatten(2)
    low, high = flat.amin(2, keepdim=True).double(), flat.amax(2, keepdim=True).double()
    levels = torch.arange(256, device=images.device, dtype=torch.float64).expand(*flat.shape[:2], 256)
    # `255 / tensor` would multiply by a rounded reciprocal.
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)
    tables = torch.where(high > low, (levels * scale - low * scale).trunc().clamp(0, 255), levels)
    return _look_up(tables.to(torch.uint8), images)


def _equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    levels = torch.arange(256, device=images.device).expand_as(counts)
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (counts.sum(2, keepdim=True) - last) // 255
    below = counts.cumsum(2) - counts
    tables = torch.where(step > 0, ((step // 2 + below) // step.clamp(min=1)).clamp(max=255), levels)
    return _look_up(tables.to(torch.uint8), images)


def _invert(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return 255 - images


def _posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Keeps the upper `bits` bits of each byte."""
    return images & ((255 << (8 - bits.to(torch.int32))) & 255).to(torch.uint8)


def _solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(images < threshold, images, 255 - images)


def _solarize_add(images: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return torch.where(images < SOLARIZE_ADD_BELOW, _truncate(images + added), images)


def _color(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(_luma(images), images, factor)


def _contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mean = (_luma(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean, images, factor)


def _brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _truncate(images * factor)


def _sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blends with the image smoothed by a 3×3 filter, which leaves the outermost pixels unchanged."""
    values = images.to(torch.int32)
    across = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    total = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + 4 * values[..., 1:-1, 1:-1]
    smooth = values.clone()
    smooth[..., 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded
    return _blend(smooth, images, factor)


def _blur(images: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with standard deviation `radius` pixels as three box filters, each with replicated edges.

    `radius` is on the host.
    """
    b, channels, _, side = images.shape
    taps = on_device(_box_taps(radius.view(b, 1)).repeat_interleave(channels, 0)[:, None], images.device)
    reach = taps.shape[-1] // 2
    blurred = images.float().view(1, b * channels, side, side)
    for shape, pad in ((taps[:, :, None, :], [reach, reach, 0, 0]), (taps[:, :, :, None], [0, 0, reach, reach])):
        for _ in range(BLUR_PASSES):
            blurred = F.conv2d(F.pad(blurred, pad, mode="replicate"), shape, groups=b * channels)
    return blurred.view_as(images).round().clamp(0, 255).to(torch.uint8)


def _box_taps(radius: torch.Tensor) -> torch.Tensor:
    """Returns [b, 2·reach + 1]: a box with soft ends; BLUR_PASSES of them have variance `radius`² (radius [b, 1]).

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (2011); as in PIL.
    """
    variance = radius**2 / BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    end = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max()) + 1
    distance = torch.arange(-reach, reach + 1, device=radius.device).abs()
    taps = torch.where(distance <= whole, 1.0, torch.where(distance == whole + 1, end, 0.0))
    return taps / (2 * (whole + end) + 1)


KERNELS: dict[int, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    policy.AUTOCONTRAST: _autocontrast,
    policy.EQUALIZE: _equalize,
    policy.INVERT: _invert,
    policy.POSTERIZE: _posterize,
    policy.SOLARIZE: _solarize,
    policy.SOLARIZE_ADD: _solarize_add,
    policy.COLOR: _color,
    policy.CONTRAST: _contrast,
    policy.BRIGHTNESS: _brightness,
    policy.SHARPNESS: _sharpness,
    policy.BLUR: _blur,
}
