"""The interface of decoders, from encoded images to the teacher's square input.

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
    """Settings of a decoder.

    Attributes:
        size: S, in pixels.
        view: "full" or "center", see `teacher_region`.
        crop_pct: See `teacher_region`.
        interpolation: "bilinear", "bicubic", …
        orientation: "exif": rotate images as their EXIF tag says; "ignore": do not.
        batch_size: Most images per call.
        threads: CPU threads.
        device: "cpu" or "cuda…".
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

    Attributes:
        pixels: uint8 [K, S, S, 3].
        sizes: int64 [K, 2]: height and width of each decoded image, after its rotation.
        kept: Positions of the K images in the batch, ascending.
        failures: position -> reason, for all other images.
    """

    pixels: torch.Tensor
    sizes: np.ndarray
    kept: list[int]
    failures: dict[int, str]


class Decoder(Protocol):
    """Decodes image files and resizes them to the teacher's input."""

    name: str

    def __call__(self, encoded: list[bytes]) -> Decoded:
        """Decodes a batch of image files."""
        ...


def teacher_region(height: int, width: int, view: str, crop_pct: float) -> tuple[float, float, float, float]:
    """Returns the part of an image that the teacher sees.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        view: "full": the whole image. "center": the centered square whose side is `crop_pct` of the shorter side; it is
            what remains after resizing the shorter side to S / crop_pct and cropping S×S.
        crop_pct: Share of the shorter side.

    Returns:
        y0, x0, y1, x1 as fractions of the image.
    """
    if view == "full":
        return 0.0, 0.0, 1.0, 1.0
    side = min(height, width) * crop_pct
    y, x = side / height / 2, side / width / 2
    return 0.5 - y, 0.5 - x, 0.5 + y, 0.5 + x
