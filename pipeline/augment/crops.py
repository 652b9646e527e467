"""The window of each image: random resized crop for training, center crop for evaluation.

Legend: B images; S input side. Windows are (y0, x0, y1, x1) in pixels of the decoded image, half-open.
"""

from __future__ import annotations

import math

import numpy as np

ATTEMPTS = 10


def random_resized_crops(
    sizes: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Draws windows of whole pixels, as torchvision does.

    Args:
        sizes: int64 [B, 2]: height and width of the images.
        scale: Range of the share of the image area.
        ratio: Range of the aspect ratio, width to height; its logarithm is uniform.
        rng: Random number generator.

    Returns:
        int64 [B, 4]: windows.
    """
    n = len(sizes)
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * rng.uniform(*scale, (n, ATTEMPTS))
    aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), (n, ATTEMPTS)))
    position = rng.random((n, 2))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    first = fits.argmax(1)  # the first attempt that fits; 0 if none does
    drawn = np.stack([h[np.arange(n), first], w[np.arange(n), first]], 1)
    corner = np.floor(position * (np.maximum(sizes - drawn, 0) + 1)).astype(np.int64)
    fallback = _largest_center(sizes, ratio)
    shape = np.where(fits.any(1)[:, None], drawn, fallback)
    corner = np.where(fits.any(1)[:, None], corner, (sizes - fallback) // 2)
    return np.concatenate([corner, corner + shape], 1)


def _largest_center(sizes: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """Returns int64 [B, 2]: height and width of the largest part with an allowed aspect ratio."""
    height, width = sizes[:, 0], sizes[:, 1]
    h = np.where(width < ratio[0] * height, np.rint(width / ratio[0]), height)
    w = np.where(width > ratio[1] * height, np.rint(height * ratio[1]), width)
    return np.stack([np.clip(h, 1, height), np.clip(w, 1, width)], 1).astype(np.int64)


def center_crops(sizes: np.ndarray, side: int, crop_pct: float, crop_mode: str) -> np.ndarray:
    """Computes the windows of timm's evaluation: resize, then center crop S×S, with the same rounding.

    Args:
        sizes: int64 [B, 2]: height and width of the images.
        side: S.
        crop_pct: S as a share of the resized side.
        crop_mode: "center": the shorter side is resized to S / crop_pct; "squash": both sides are.

    Returns:
        float64 [B, 4]: windows.
    """
    resized_side = math.floor(side / crop_pct)
    if crop_mode == "squash":
        resized = np.full_like(sizes, resized_side)
    else:
        resized = (resized_side * sizes / sizes.min(1, keepdims=True) + 1e-9).astype(np.int64)
    corner = np.rint((resized - side) / 2.0)
    pixel = sizes / resized
    return np.concatenate([corner * pixel, (corner + side) * pixel], 1)
