"""Encoded images to the teacher's square input: what a decoder returns, which part it shows, and the choice of one.

Legend: B images; S side of the teacher's square input.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from labeler.errors import InputError

if TYPE_CHECKING:
    import torch


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


def create_decoder(
    name: str,
    *,
    size: int,
    view: str,
    crop_pct: float,
    interpolation: str,
    orientation: str,
    batch_size: int,
    threads: int,
    device: str,
) -> Decoder:
    """`name` is "dali", "pil" or "auto": DALI where it is installed."""
    if name == "auto":
        name = "dali" if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali") else "pil"
    if name == "pil":
        from labeler.decode_reference import ReferenceDecoder

        return ReferenceDecoder(size, view, crop_pct, interpolation, orientation)
    try:
        from labeler.decode_dali import DaliDecoder
    except ImportError as error:
        raise InputError(
            "DALI cannot be imported", got=str(error), remedy="Install it, or use --decoder pil."
        ) from None
    return DaliDecoder(size, view, crop_pct, interpolation, orientation, batch_size, threads, device)
