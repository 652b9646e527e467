"""Image file to pixels: one definition for labeler and loaders, carried out by PIL.

* the first image of a file of many: a page of a TIFF, a frame of a WebP, the default image of an animated PNG;
* rotated as the EXIF orientation says, or as stored, by a setting that the label store keeps; XMP is ignored;
* the upper 8 bits of 16-bit samples;
* transparency is dropped: colors are those in the file, even where they would be invisible;
* gray, palettes, CMYK and YCbCr become RGB by PIL's plain formulas; color profiles and gamma are ignored;
* 32-bit samples are refused: the file does not say which value is white.

DALI decodes ordinary JPEGs and PNGs (`plain_files`) in the same way. It gets everything else as a PPM of pixels that
PIL has decoded, so that nothing depends on how it reads other formats.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

ORIENTATION_TAG = 0x0112
ORIENTATIONS = ("exif", "ignore")  # rotate images as their tag says, or not


def open_rgb(data: bytes, orientation: str) -> Image:
    """Decodes an image file in full.

    Args:
        data: Bytes of the file.
        orientation: "exif": rotate the image as its tag says; "ignore": leave it as stored.

    Returns:
        An RGB image of PIL.
    """
    from PIL import Image

    image: Image.Image = Image.open(io.BytesIO(data))
    tag = orientation_tag(image)
    rotated = image.format == "TIFF"  # which PIL rotates by itself while it loads
    image.load()
    image.info.pop("transparency", None)
    image = _eight_bits(image)
    if image.mode != "RGB":  # avoids a copy
        image = image.convert("RGB")
    if rotated == (orientation == "exif"):
        return image
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE}
    turns |= {6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    if rotated:
        tag = {6: 8, 8: 6}.get(tag, tag)  # rotate back; the others are their own inverse
    return image.transpose(turns[tag]) if tag in turns else image


def _eight_bits(image: Image) -> Image:
    """Keeps the upper bits of 16-bit gray, which PIL would clip at 255, as PIL itself reads 16-bit colors."""
    from PIL import Image

    # PIL scales the samples of a PGM to 16 bits, in a 32-bit image.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("samples of 32 bits, or signed ones: the value of white is not known")
    return image


def orientation_tag(image: Image) -> int:
    """Returns the EXIF orientation of an opened image, 1 to 8. XMP is ignored, since DALI does not read it."""
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)
    if image.format == "PNG":
        image.load()  # its block may come after the pixels
    return _orientation(image.getexif)


def read_orientation(block: bytes) -> int:
    """Returns the orientation in the EXIF block of a JPEG, 1 to 8."""
    from PIL import Image

    def read() -> Exif:
        exif = Image.Exif()
        exif.load(block)
        return exif

    return _orientation(read)


def _orientation(read: Callable[[], Exif]) -> int:
    """Returns the orientation, or 1 if the block is broken, as in many files, or makes no sense."""
    try:
        tag = read().get(ORIENTATION_TAG, 1)
    except Exception:  # PIL's parser raises many types
        return 1
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def decoded_size(image: Image, orientation: str) -> tuple[int, int]:
    """Returns height and width of an opened image after decoding and rotation, from its header alone."""
    width, height = image.size
    # PIL gives the size of a TIFF after its rotation.
    swapped = orientation_tag(image) >= 5 and (orientation == "exif") != (image.format == "TIFF")
    return (width, height) if swapped else (height, width)


def as_ppm(image: Image) -> bytes:
    """Returns an RGB image as a PPM file, which every decoder reads in the same way."""
    return b"".join([b"P6 %d %d 255\n" % image.size, image.tobytes()])
