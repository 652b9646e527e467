"""The decoder for CPUs, with PIL: readable twin of `decode_dali`, and faster than that without a GPU.

Legend: B images; S side of the teacher's square input.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from labeler.decode import Decoded, DecodeSettings, teacher_region
from labeler.resize import resize

if TYPE_CHECKING:
    from PIL.Image import Image


class ReferenceDecoder:
    """Encoded images to the teacher's input, each by itself, in as many threads as the settings say."""

    name = "pil"

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings

    def __call__(self, encoded: list[bytes]) -> Decoded:
        with ThreadPoolExecutor(self.settings.threads, thread_name_prefix="pil") as pool:
            shown = list(pool.map(self.show, encoded))
        good = {i: found for i, found in enumerate(shown) if not isinstance(found, str)}
        # With numpy: this is a thread of its own beside the teacher's, see `labeler.resize`.
        pixels = np.zeros((len(good), self.settings.size, self.settings.size, 3), np.uint8)
        for place, (image, _) in enumerate(good.values()):
            pixels[place] = image
        sizes = np.array([size for _, size in good.values()], np.int64).reshape(-1, 2)
        failures = {i: found for i, found in enumerate(shown) if isinstance(found, str)}
        return Decoded(torch.from_numpy(pixels), sizes, list(good), failures)

    def show(self, data: bytes) -> tuple[np.ndarray, tuple[int, int]] | str:
        """One image [S, S, 3], and its height and width; or why it cannot be decoded."""
        wanted = self.settings
        try:
            image = open_rgb(data, wanted.orientation)
        except Exception as error:  # PIL's decoders raise many types
            return f"cannot be decoded: {error}"
        height, width = image.height, image.width
        y0, x0, y1, x1 = teacher_region(height, width, wanted.view, wanted.crop_pct)
        box = None if wanted.view == "full" else (y0 * height, x0 * width, y1 * height, x1 * width)
        return resize(np.array(image), wanted.size, wanted.interpolation, box), (height, width)


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
