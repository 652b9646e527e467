"""Which files DALI decodes as PIL does, told without decoding: ordinary JPEGs and PNGs, in 20 and 50 µs.

What is in doubt is not ordinary, and costs no more than being decoded by PIL. Tried with thousands of damaged files:
of those that pass here and whose header PIL opens, DALI refused all that PIL did, and saw the same of the others.
"""

from __future__ import annotations

import re
import zlib

from labeler.sources.pixels import ORIENTATION_TAG, read_orientation

START, END = b"\xff\xd8", b"\xff\xd9"
FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive, all with Huffman codes
SCAN, EXIF, ADOBE = 0xDA, 0xE1, 0xEE
# Tables, restart interval, application data, comments.
OTHERS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
YCBCR = b"\1"  # of an Adobe marker
COMPONENTS = frozenset({b"\0\1\2", b"\1\2\3"})  # ids of Y, Cb, Cr; others may stand for R, G, B
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # in coded pixels: neither a byte 255 nor a restart

PNG = b"\x89PNG\r\n\x1a\n"
EIGHT_BITS = (b"\x08\0\0\0\0", b"\x08\2\0\0\0")  # of grey or RGB, not interlaced
SILENT = frozenset({b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"bKGD", b"tEXt"})  # change no pixel
PROFILE = b"Raw profile"  # EXIF in a tEXt


def plain_file(data: bytes) -> bytes | None:
    """The file as DALI is to see it where that decodes it as PIL does; None where PIL must."""
    return data if is_plain_png(data) else plain_jpeg(data)


def is_plain_png(data: bytes) -> bool:
    """Whether a file is an undamaged PNG of 8 bits, grey or RGB, without transparency, animation or orientation.

    Chunks behind the pixels are in doubt: what PIL refuses in them it finds only while it decodes.
    """
    if not data.startswith(PNG) or data[24:29] not in EIGHT_BITS:
        return False
    view, place, before = memoryview(data), len(PNG), b""
    while place + 12 <= len(data):
        kind, end = data[place + 4 : place + 8], place + 8 + int.from_bytes(data[place : place + 4], "big")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if kind == b"IEND":
            return before == b"IDAT" and end + 4 == len(data)
        silent = kind in SILENT and before not in (b"", b"IDAT") and not data.startswith(PROFILE, place + 8)
        if not (kind == b"IDAT" or silent or (kind == b"IHDR" and not before)):
            return False
        place, before = end + 4, kind
    return False


def plain_jpeg(data: bytes) -> bytes | None:
    """An ordinary JPEG as DALI is to see it, None for anything else.

    An ordinary JPEG is a whole one of 8 bits, grey or YCbCr. Whole is one with an end marker at its end and no stray
    marker before it; other damage is for the decoder to find. Of an EXIF block only the orientation is left: DALI and
    PIL do not agree on what a faulty one says.
    """
    if not data.startswith(START):
        return None
    place, framed, exif = len(START), False, slice(0, 0)
    while place + 4 <= len(data):
        fill, marker, length = data[place], data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        start, place = place, place + 2 + length
        segment = data[start + 4 : place]
        if marker == SCAN:
            found = MARKER.search(data, place)
            good = framed and found is not None
            place = found.start() if found else place
        elif marker in FRAMES:
            good = not framed and _is_plain_frame(segment)
            framed = True
        elif marker == EXIF and segment.startswith(b"Exif\0\0"):
            good = not exif.stop and not framed
            exif = slice(start, place)
        elif marker == ADOBE and segment.startswith(b"Adobe"):
            good = segment[11:12] == YCBCR
        else:
            good = marker in OTHERS
        if fill != 0xFF or length < 2 or not good:
            return None
    if not framed or data[place:] != END:
        return None
    return data[: exif.start] + _orientation_alone(data[exif]) + data[exif.stop :] if exif.stop else data


def _is_plain_frame(segment: bytes) -> bool:
    """8 bits, a size, and one component or Y with Cb and Cr that are no finer."""
    count = segment[5] if len(segment) > 5 else 0
    sized = segment[0] == 8 and any(segment[1:3]) and any(segment[3:5]) if count else False
    if not sized or len(segment) != 6 + 3 * count:
        return False
    return count == 1 or (segment[6::3] in COMPONENTS and segment[10::3] == b"\x11\x11")


def _orientation_alone(segment: bytes) -> bytes:
    """An EXIF segment with nothing but the orientation of this one; none where it does not turn the image."""
    tag = ORIENTATION_TAG.to_bytes(2, "big")
    if tag not in segment and tag[::-1] not in segment:
        return b""
    turn = read_orientation(segment[4:])
    if turn == 1:
        return b""
    entry = tag + b"\0\3" + b"\0\0\0\1" + bytes([0, turn, 0, 0])
    block = b"Exif\0\0" + b"MM\0*\0\0\0\x08" + b"\0\1" + entry + bytes(4)
    return bytes([0xFF, EXIF, 0, 2 + len(block)]) + block
