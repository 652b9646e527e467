"""Encoded images to the teacher's square input: what a decoder gets, what it returns, and what it shows of an image.

Legend: B images; S side of the teacher's square input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DecodeSettings:
    """What every decoder needs to know.

    size            S
    view, crop_pct  see `teacher_region`
    interpolation   "bilinear", "bicubic", …
    orientation     "exif": turn images as their EXIF tag says; "ignore": do not
    batch_size      most images at once
    threads         CPU threads
    device          "cpu" or "cuda…"
    """

    size: int
    view: str = "full"
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    orientation: str = "exif"
    batch_size: int = 32
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Decoded:
    """The images of a batch that could be decoded.

    pixels    uint8 [K, S, S, 3]
    sizes     int64 [K, 2]: height and width of the decoded image, after its orientation
    kept      their K positions in the batch, rising
    failures  position -> reason, for all others
    """

    pixels: torch.Tensor
    sizes: np.ndarray
    kept: list[int]
    failures: dict[int, str]


class Decoder(Protocol):
    name: str

    def __call__(self, encoded: list[bytes]) -> Decoded: ...


def teacher_region(height: int, width: int, view: str, crop_pct: float) -> tuple[float, float, float, float]:
    """y0, x0, y1, x1 of what the teacher sees, as fractions of the image.

    "full": everything. "center": the square of `crop_pct` of the shorter side in the middle, which is what resizing
    the shorter side to S / crop_pct and cropping S×S shows.
    """
    if view == "full":
        return 0.0, 0.0, 1.0, 1.0
    side = min(height, width) * crop_pct
    y, x = side / height / 2, side / width / 2
    return 0.5 - y, 0.5 - x, 0.5 + y, 0.5 + x
