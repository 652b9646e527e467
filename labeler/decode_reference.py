"""The readable decoder, with PIL: twin of `decode_dali`, and its stand-in where DALI has no wheel.

Legend: B images; S side of the teacher's square input.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import torch

from labeler.decode import Decoded, DecodeSettings, teacher_region

if TYPE_CHECKING:
    from PIL.Image import Image


class ReferenceDecoder:
    """Encoded images to the teacher's input, one after the other."""

    name = "pil"

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings

    def __call__(self, encoded: list[bytes]) -> Decoded:
        from PIL import Image

        wanted = self.settings
        method = Image.Resampling[wanted.interpolation.upper()]
        pixels, sizes, failures, kept = [], [], {}, []
        for i, data in enumerate(encoded):
            try:
                image = open_rgb(data, wanted.orientation)
            except Exception as error:  # PIL's decoders raise many types
                failures[i] = f"cannot be decoded: {error}"
                continue
            height, width = image.height, image.width
            y0, x0, y1, x1 = teacher_region(height, width, wanted.view, wanted.crop_pct)
            box = (x0 * width, y0 * height, x1 * width, y1 * height)
            pixels.append(np.asarray(image.resize((wanted.size, wanted.size), method, box=box)))
            sizes.append((height, width))
            kept.append(i)
        stack = np.stack(pixels) if pixels else np.zeros((0, wanted.size, wanted.size, 3), np.uint8)
        return Decoded(torch.from_numpy(stack), np.array(sizes, np.int64).reshape(-1, 2), kept, failures)


ORIENTATION_TAG = 0x0112


def open_rgb(data: bytes, orientation: str) -> Image:
    """A fully decoded RGB PIL image; `orientation` "exif" turns it as its tag says, "ignore" leaves it as stored."""
    from PIL import Image, ImageOps

    image: Image.Image = Image.open(io.BytesIO(data))
    tag = orientation_tag(image)
    image.load()
    if image.format == "TIFF":  # which PIL turns by itself while it loads
        turn = Image.Transpose
        undo = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE}
        undo |= {6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
        if orientation == "ignore" and tag in undo:
            image = image.transpose(undo[tag])
    elif orientation == "exif":
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # PIL clips 16-bit grey at 255 when it converts; DALI scales it, as a viewer would.
        image = Image.fromarray((np.asarray(image, np.uint16) // 257).astype(np.uint8))
    return image.convert("RGB")


def orientation_tag(image: Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8. What XMP says is dropped: DALI does not read it."""
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)
    return image.getexif().get(ORIENTATION_TAG, 1)


def decoded_size(image: Image, orientation: str) -> tuple[int, int]:
    """Height and width that an opened image has once it is decoded and turned, from its header alone."""
    width, height = image.size
    # PIL gives the size of a TIFF as it will be turned.
    swapped = orientation_tag(image) >= 5 and (orientation == "exif") != (image.format == "TIFF")
    return (width, height) if swapped else (height, width)
