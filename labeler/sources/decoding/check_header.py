"""The checks of an image file that need no decoding: its format and its size."""

from __future__ import annotations

import io
import warnings

from labeler.sources.image_source import BadImage

# The formats that labeler and loaders decode, see `labeler.sources.decoding.pixels`.
FORMATS = frozenset({"JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"})


def check_header(data: bytes, min_side: int, max_pixels: int) -> None:
    """Checks an image's header, before any decoding.

    Args:
        data: Bytes of the image file.
        min_side: Smallest side in pixels that is allowed.
        max_pixels: Most pixels that are allowed.

    Raises:
        BadImage: It cannot be an image for training.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # The limit below is ours; PIL would warn about its own.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            kind, (width, height) = image.format, image.size
    except UnidentifiedImageError:
        raise BadImage("not an image, or of an unknown format") from None
    except Image.DecompressionBombError:
        raise BadImage("so many pixels that it could be a decompression bomb") from None
    except Exception as error:  # decoders raise errors of any type on broken headers
        raise BadImage(f"broken header: {error}") from None
    if kind not in FORMATS:
        raise BadImage(f"{kind} is not a format that the training loader decodes")
    if min(width, height) < min_side:
        raise BadImage(f"too small: {height}×{width} pixels, the shorter side must have {min_side}")
    if width * height > max_pixels:
        raise BadImage(f"too large: {height}×{width} pixels, more than {max_pixels:,} in all")
