"""What the pixels of an image file are: one definition for labeler and loaders, carried out by PIL.

* the first picture of a file of many: a page of a TIFF, a frame of a WebP, the default image of an animated PNG;
* turned as the EXIF orientation says, or as stored, by one setting that the label store keeps; XMP is not asked;
* of 16-bit samples, the upper 8 bits;
* transparency is dropped: the colours are those that the file holds, also where they are not seen;
* grey, palettes, CMYK and YCbCr to RGB by PIL's plain formulas; colour profiles and gamma are not asked;
* 32-bit samples are refused: nobody says which of their values is white.

DALI decodes ordinary JPEGs and PNGs (`plain_files`) in this way. All else reaches it as a PPM of pixels that PIL has
decoded, so that nothing depends on what it makes of other formats.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

ORIENTATION_TAG = 0x0112
ORIENTATIONS = ("exif", "ignore")  # turn images as their tag says, or not


def open_rgb(data: bytes, orientation: str) -> Image:
    """A fully decoded RGB PIL image; `orientation` "exif" turns it as its tag says, "ignore" leaves it as stored."""
    from PIL import Image

    image: Image.Image = Image.open(io.BytesIO(data))
    tag = orientation_tag(image)
    turned = image.format == "TIFF"  # which PIL turns by itself while it loads
    image.load()
    image.info.pop("transparency", None)
    image = _eight_bits(image)
    if image.mode != "RGB":  # not to copy it
        image = image.convert("RGB")
    if turned == (orientation == "exif"):
        return image
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE}
    turns |= {6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    if turned:
        tag = {6: 8, 8: 6}.get(tag, tag)  # back; the others undo themselves
    return image.transpose(turns[tag]) if tag in turns else image


def _eight_bits(image: Image) -> Image:
    """Of 16-bit grey, which PIL would clip at 255, the upper bits, as PIL itself reads 16-bit colours."""
    from PIL import Image

    # PIL scales the samples of a PGM to 16 bits, in a 32-bit image.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("samples of 32 bits, or signed ones: no one knows which of them is white")
    return image


def orientation_tag(image: Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8. What XMP says is dropped: DALI does not read it."""
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)
    if image.format == "PNG":
        image.load()  # its block may stand behind the pixels
    return _orientation(image.getexif)


def read_orientation(block: bytes) -> int:
    """The orientation that the EXIF block of a JPEG tells, 1 to 8."""
    from PIL import Image

    def read() -> Exif:
        exif = Image.Exif()
        exif.load(block)
        return exif

    return _orientation(read)


def _orientation(read: Callable[[], Exif]) -> int:
    """1 where the block is broken, which many a file's is, or makes no sense."""
    try:
        tag = read().get(ORIENTATION_TAG, 1)
    except Exception:  # PIL's parser raises many types
        return 1
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def decoded_size(image: Image, orientation: str) -> tuple[int, int]:
    """Height and width that an opened image has once it is decoded and turned, from its header alone."""
    width, height = image.size
    # PIL gives the size of a TIFF as it will be turned.
    swapped = orientation_tag(image) >= 5 and (orientation == "exif") != (image.format == "TIFF")
    return (width, height) if swapped else (height, width)


def as_ppm(image: Image) -> bytes:
    """An RGB image as a file that every decoder reads in the same way."""
    return b"".join([b"P6 %d %d 255\n" % image.size, image.tobytes()])
