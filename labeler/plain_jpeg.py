"""Which files DALI decodes as PIL does, told from their markers alone: ordinary JPEGs, in 20 µs.

What is in doubt is not ordinary, and costs no more than being decoded by PIL.
"""

from __future__ import annotations

import re

from labeler.pixels import ORIENTATION_TAG, read_orientation

START, END = b"\xff\xd8", b"\xff\xd9"
FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive, all with Huffman codes
SCAN, EXIF, ADOBE = 0xDA, 0xE1, 0xEE
# Tables, restart interval, application data, comments.
OTHERS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
YCBCR = b"\1"  # of an Adobe marker
COMPONENTS = frozenset({b"\0\1\2", b"\1\2\3"})  # ids of Y, Cb, Cr; others may stand for R, G, B
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # in coded pixels: neither a byte 255 nor a restart


def plain_jpeg(data: bytes) -> bytes | None:
    """The file as DALI is to see it where that decodes it as PIL does; None where PIL must.

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
