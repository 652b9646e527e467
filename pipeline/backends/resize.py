"""Resizes and normalizes one image on a CPU, with Numba's kernels or, where these cannot run, with Pillow and numpy.

Both ways give the same bytes. Legend: S side of the square output.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import PIL
from PIL import Image

from pipeline.compiled.available import kernels

# From this version on Pillow resizes the height first where that saves work.
CHOOSES_ORDER = 13


def resize(
    pixels: np.ndarray, side: int, window: Sequence[int], box: Sequence[float] | None, cubic: bool, flip: bool
) -> np.ndarray:
    """Resizes a part of an image to a square, as Pillow does.

    Args:
        pixels: uint8 [height, width, 3].
        side: S.
        window: (y0, x0, y1, x1): the pixels that the filter sees.
        box: (y0, x0, y1, x1) in pixels of the window: the part that becomes the output; None: the whole window.
        cubic: Bicubic instead of bilinear.
        flip: Mirror the output, left to right.

    Returns:
        uint8 [S, 4·S]: RGBX.
    """
    y0, x0, y1, x1 = window
    height, width = y1 - y0, x1 - x0
    box = box or (0, 0, height, width)
    compiled = kernels("resize_kernels")
    if compiled is None:
        return _by_pillow(pixels[y0:y1, x0:x1], side, box, cubic, flip)
    # Pillow's own rule, and what it costs to break it is a rounding in many pixels.
    shrinks = height - side
    height_first = _pillow() >= CHOOSES_ORDER and shrinks > 0 and shrinks > 2 * (width - side)
    out = np.empty((side, side), np.uint32)
    flat = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
    compiled.resize(flat, (y0, x0, y1, x1), tuple(map(np.float32, box)), cubic, flip, height_first, out)
    return out.view(np.uint8)


def normalize(pixels: np.ndarray, mean: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Writes (pixel − mean) · scale of an image to `out`.

    Args:
        pixels: uint8 [S, 4·S]: RGBX.
        mean: float32 [3].
        scale: float32 [3].
        out: float32 [3, S, S].
    """
    compiled = kernels("resize_kernels")
    if compiled is not None:
        compiled.normalize(pixels, mean, scale, out)
        return
    colors = pixels.reshape(len(pixels), -1, 4)[..., :3].transpose(2, 0, 1)
    np.subtract(colors, mean[:, None, None], out=out)
    np.multiply(out, scale[:, None, None], out=out)


def _by_pillow(pixels: np.ndarray, side: int, box: Sequence[float], cubic: bool, flip: bool) -> np.ndarray:
    """Resizes a window with Pillow; see `resize`."""
    y0, x0, y1, x1 = box
    method = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    image = Image.fromarray(pixels).resize((side, side), method, box=(x0, y0, x1, y1))
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
    return np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8).reshape(side, 4 * side)


@functools.cache
def _pillow() -> int:
    """Returns the major version of Pillow."""
    return int(PIL.__version__.split(".")[0])
