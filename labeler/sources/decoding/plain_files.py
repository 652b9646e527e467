"""Finds, without decoding, the files that every decoder reads like PIL: ordinary JPEGs and PNGs, in 20 and 50 µs.

A doubtful file is not ordinary; PIL then decodes it, which only takes longer. Tested with thousands of damaged files:
of those that pass here and whose header PIL opens, DALI refused all that PIL did, and decoded the others alike.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from labeler.sources.decoding.pixels import ORIENTATION_TAG, read_orientation

START, END = b"\xff\xd8", b"\xff\xd9"
FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive, all with Huffman codes
SCAN, EXIF, ADOBE = 0xDA, 0xE1, 0xEE
# Tables, restart interval, application data, comments.
OTHERS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
YCBCR = b"\1"  # of an Adobe marker
COMPONENTS = frozenset({b"\0\1\2", b"\1\2\3"})  # ids of Y, Cb, Cr; others may mean R, G, B
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # in coded pixels: neither a byte 255 nor a restart

PNG = b"\x89PNG\r\n\x1a\n"
EIGHT_BITS = (b"\x08\0\0\0\0", b"\x08\2\0\0\0")  # of gray or RGB, not interlaced
SILENT = frozenset({b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"bKGD", b"tEXt"})  # change no pixel
PROFILE = b"Raw profile"  # EXIF in a tEXt


def plain_file(data: bytes) -> bytes | None:
    """Returns the bytes to give to DALI if it decodes the file like PIL; None if PIL has to decode it."""
    return data if is_plain_png(data) else plain_jpeg(data)


def is_plain_png(data: bytes) -> bool:
    """Whether a file is an undamaged PNG of 8 bits, gray or RGB, without transparency, animation or orientation.

    Chunks after the pixels count as doubtful: PIL finds errors in them only while it decodes.
    """
    if not data.startswith(PNG) or data[24:29] not in EIGHT_BITS:
        return False
    view, offset, before = memoryview(data), len(PNG), b""
    while offset + 12 <= len(data):
        kind, end = data[offset + 4 : offset + 8], offset + 8 + int.from_bytes(data[offset : offset + 4], "big")
        if zlib.crc32(view[offset + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if kind == b"IEND":
            return before == b"IDAT" and end + 4 == len(data)
        silent = kind in SILENT and before not in (b"", b"IDAT") and not data.startswith(PROFILE, offset + 8)
        if not (kind == b"IDAT" or silent or (kind == b"IHDR" and not before)):
            return False
        offset, before = end + 4, kind
    return False


@dataclass(frozen=True)
class PlainJpeg:
    """Where things are in an ordinary JPEG.

    Attributes:
        exif: Its EXIF segment; empty, at 0, if it has none.
        height_at: The two bytes with its height.
        size: Height and width as stored.
    """

    exif: slice
    height_at: int
    size: tuple[int, int]

    def is_upright(self, data: bytes) -> bool:
        """Whether its EXIF block leaves the image as it is stored."""
        return not self.exif.stop or _turn(data[self.exif]) == 1


def plain_jpeg(data: bytes) -> bytes | None:
    """Returns the bytes of an ordinary JPEG to give to DALI; None for anything else.

    Only the orientation is kept of an EXIF block, since DALI and PIL read faulty ones differently.
    """
    plain = parse_plain_jpeg(data)
    if plain is None or not plain.exif.stop:
        return None if plain is None else data
    return data[: plain.exif.start] + _orientation_alone(data[plain.exif]) + data[plain.exif.stop :]


def parse_plain_jpeg(data: bytes) -> PlainJpeg | None:
    """Finds the parts of an ordinary JPEG; None for anything else.

    An ordinary JPEG has 8 bits, is gray or YCbCr, and is complete: it ends with an end marker, without a stray marker
    before it. Other damage is left to the decoder.
    """
    if not data.startswith(START):
        return None
    offset, frame, exif = len(START), 0, slice(0, 0)
    while offset + 4 <= len(data):
        fill, marker, length = data[offset], data[offset + 1], int.from_bytes(data[offset + 2 : offset + 4], "big")
        start, offset = offset, offset + 2 + length
        segment = data[start + 4 : offset]
        if marker == SCAN:
            match = MARKER.search(data, offset)
            good = bool(frame) and match is not None
            offset = match.start() if match else offset
        elif marker in FRAMES:
            good = not frame and _is_plain_frame(segment)
            frame = start
        elif marker == EXIF and segment.startswith(b"Exif\0\0"):
            good = not exif.stop and not frame
            exif = slice(start, offset)
        elif marker == ADOBE and segment.startswith(b"Adobe"):
            good = segment[11:12] == YCBCR
        else:
            good = marker in OTHERS
        if fill != 0xFF or length < 2 or not good:
            return None
    if not frame or data[offset:] != END:
        return None
    at = frame + 5
    return PlainJpeg(exif, at, (int.from_bytes(data[at : at + 2], "big"), int.from_bytes(data[at + 2 : at + 4], "big")))


def _is_plain_frame(segment: bytes) -> bool:
    """Whether a frame has 8 bits, a size, and one component or Y, Cb and Cr, the latter two not finer than Y."""
    count = segment[5] if len(segment) > 5 else 0
    sized = segment[0] == 8 and any(segment[1:3]) and any(segment[3:5]) if count else False
    if not sized or len(segment) != 6 + 3 * count:
        return False
    return count == 1 or (segment[6::3] in COMPONENTS and segment[10::3] == b"\x11\x11")


def _turn(segment: bytes) -> int:
    """Returns the orientation in an EXIF segment, 1 to 8."""
    tag = ORIENTATION_TAG.to_bytes(2, "big")
    return read_orientation(segment[4:]) if tag in segment or tag[::-1] in segment else 1


def _orientation_alone(segment: bytes) -> bytes:
    """Returns an EXIF segment with only the orientation of this one; empty if that does not rotate the image."""
    turn = _turn(segment)
    if turn == 1:
        return b""
    entry = ORIENTATION_TAG.to_bytes(2, "big") + b"\0\3" + b"\0\0\0\1" + bytes([0, turn, 0, 0])
    block = b"Exif\0\0" + b"MM\0*\0\0\0\x08" + b"\0\1" + entry + bytes(4)
    return bytes([0xFF, EXIF, 0, 2 + len(block)]) + block
