"""Which files DALI decodes as PIL does, told from their markers alone: ordinary JPEGs, in a few microseconds.

What is in doubt is not plain, and costs no more than being decoded by PIL.
"""

from __future__ import annotations

import re
from typing import Literal

START, END = b"\xff\xd8", b"\xff\xd9"
FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive, all with Huffman codes
SCAN, EXIF, ADOBE = 0xDA, 0xE1, 0xEE
# Tables, restart interval, application data, comments.
OTHERS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
YCBCR = 1  # of an Adobe marker
COMPONENTS = frozenset({b"\0\1\2", b"\1\2\3"})  # ids of Y, Cb, Cr; others may stand for R, G, B
ORIENTATION_TAG, SHORT = 0x0112, 3
# In coded pixels: neither a byte 255 nor a restart.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a file is a whole JPEG of 8 bits, grey or YCbCr, with an EXIF block that can be read in one way, or none.

    Whole is one with an end marker at its end and no stray marker before it. Other damage is for the decoder to find.
    """
    if not data.startswith(START):
        return False
    place, frames, exifs = len(START), 0, 0
    while place + 4 <= len(data):
        fill, marker, length = data[place], data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if fill != 0xFF or length < 2:
            return False
        segment = data[place + 4 : place + 2 + length]
        place += 2 + length
        if marker == SCAN:
            found = MARKER.search(data, place)
            good = frames == 1 and found is not None
            place = found.start() if found else place
        elif marker in FRAMES:
            frames += 1
            good = _is_plain_frame(segment)
        elif marker == EXIF and segment.startswith(b"Exif\0\0"):
            exifs += 1
            good = exifs == 1 and not frames and _is_plain_exif(segment[6:])
        elif marker == ADOBE and segment.startswith(b"Adobe"):
            good = segment[11:12] == bytes([YCBCR])
        else:
            good = marker in OTHERS
        if not good:
            return False
    return frames == 1 and data[place:] == END


def _is_plain_frame(segment: bytes) -> bool:
    """8 bits, a size, and one component or Y with Cb and Cr that are no finer."""
    count = segment[5] if len(segment) > 5 else 0
    sized = segment[0] == 8 and any(segment[1:3]) and any(segment[3:5]) if count else False
    if not sized or len(segment) != 6 + 3 * count:
        return False
    return count == 1 or (segment[6::3] in COMPONENTS and segment[10::3] == b"\x11\x11")


def _is_plain_exif(block: bytes) -> bool:
    """A whole first directory in which the orientation stands at most once and is one of the eight."""
    if len(block) < 8 or block[:4] not in (b"II*\0", b"MM\0*"):
        return False
    order: Literal["little", "big"] = "little" if block.startswith(b"II") else "big"

    def number(place: int, size: int) -> int:
        return int.from_bytes(block[place : place + size], order)

    start = number(4, 4)
    count = number(start, 2)
    if start < 8 or start + 2 + 12 * count > len(block):
        return False
    entries = range(start + 2, start + 2 + 12 * count, 12)
    found = [place for place in entries if number(place, 2) == ORIENTATION_TAG]
    if not found:
        return True
    place = found[0]
    return len(found) == 1 and number(place + 2, 2) == SHORT and number(place + 4, 4) == 1 and number(place + 8, 2) <= 8
