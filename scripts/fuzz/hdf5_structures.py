"""Where the structures of an HDF5 file are that carry a checksum, and that checksum."""

from __future__ import annotations


def hdf5_structures(data: bytes) -> list[tuple[int, int]]:
    """(start, place of the checksum) of the structures of an HDF5 file that carry one."""
    found = []
    for word in (b"\x89HDF", b"OHDR", b"OCHK", b"FAHD", b"FADB", b"FRHP", b"FHDB", b"BTHD", b"BTLF"):
        start = data.find(word)
        while start >= 0:
            ends = range(start + 12, min(start + 1500, len(data) - 3))
            end = next((e for e in ends if lookup3(data[start:e]) == int.from_bytes(data[e : e + 4], "little")), None)
            if end is not None:
                found.append((start, end))
            start = data.find(word, start + 1)
    return found


def lookup3(data: bytes) -> int:
    """Bob Jenkins' hash, which HDF5 puts behind its structures."""
    mask = 0xFFFFFFFF

    def turned(x: int, bits: int) -> int:
        return ((x << bits) | (x >> (32 - bits))) & mask

    a = b = c = (0xDEADBEEF + len(data)) & mask
    for place in range(0, len(data), 12):
        part = data[place : place + 12].ljust(12, b"\0")
        a = (a + int.from_bytes(part[:4], "little")) & mask
        b = (b + int.from_bytes(part[4:8], "little")) & mask
        c = (c + int.from_bytes(part[8:], "little")) & mask
        if place + 12 >= len(data):
            break
        for bits in ((4, 6, 8), (16, 19, 4)):
            a, c = ((a - c) & mask) ^ turned(c, bits[0]), (c + b) & mask
            b, a = ((b - a) & mask) ^ turned(a, bits[1]), (a + c) & mask
            c, b = ((c - b) & mask) ^ turned(b, bits[2]), (b + a) & mask
    c = ((c ^ b) - turned(b, 14)) & mask
    a = ((a ^ c) - turned(c, 11)) & mask
    b = ((b ^ a) - turned(a, 25)) & mask
    c = ((c ^ b) - turned(b, 16)) & mask
    a = ((a ^ c) - turned(c, 4)) & mask
    b = ((b ^ a) - turned(a, 14)) & mask
    return ((c ^ b) - turned(b, 24)) & mask
