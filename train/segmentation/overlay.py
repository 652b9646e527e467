"""Pictures of masks: the image, the same tinted by its classes, and a legend.

Legend: C classes; H, W height and width of an image.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pipeline.batch_picture import FONT, GAP, INK, LINE, MARGIN, PAPER, SOFT, SWATCH

OPACITY = 0.55
SMALLEST = 288  # pixels of the shorter side of a panel
COLUMN = 200


def palette(classes: int) -> np.ndarray:
    """uint8 [C, 3]: a color for each class, neighbors in the order of ids far apart."""
    golden = 0.618034
    hues = [(0.58 + number * golden) % 1 for number in range(classes)]
    rows = [colorsys.hsv_to_rgb(hue, 0.75, (0.95, 0.65, 0.8)[number % 3]) for number, hue in enumerate(hues)]
    return (255 * np.array(rows)).round().astype(np.uint8)


def draw_overlay(pixels: np.ndarray, ids: np.ndarray, colors: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Draws an image and its mask.

    Args:
        pixels: uint8 [H, W, 3].
        ids: int [H, W]: class ids.
        colors: uint8 [C, 3].
        names: of the classes.

    Returns:
        The picture.
    """
    height, width = ids.shape
    scale = max(1, SMALLEST // min(height, width))
    size = (width * scale, height * scale)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    tint = Image.fromarray(colors[ids]).resize(size, Image.Resampling.NEAREST)
    left, top = MARGIN, MARGIN + LINE
    lefts = (left, left + size[0] + GAP, left + 2 * (size[0] + GAP))
    counts = np.bincount(ids.ravel(), minlength=len(names)) / ids.size
    found = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number] > 0]
    page_height = top + max(size[1], LINE * len(found)) + MARGIN
    page = Image.new("RGB", (lefts[2] + COLUMN + MARGIN, page_height), PAPER)
    page.paste(image, (lefts[0], top))
    page.paste(Image.blend(image, tint, OPACITY), (lefts[1], top))
    draw = ImageDraw.Draw(page)
    for place, heading in zip(lefts, ("image", "predicted classes", "share of the pixels"), strict=True):
        draw.text((place, MARGIN - 4), heading, SOFT, FONT)
    for line, number in enumerate(found):
        y = top + line * LINE
        draw.rectangle((lefts[2], y + 3, lefts[2] + SWATCH, y + 3 + SWATCH), tuple(colors[number].tolist()))
        draw.text((lefts[2] + SWATCH + 6, y), f"{counts[number]:.1%} {names[number]}", INK, FONT)
    return page
