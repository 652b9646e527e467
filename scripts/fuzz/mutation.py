"""Random changes of bytes and of JSON objects."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np

from labeler.base.whole_files import sealed

NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


def mutated(data: bytes, rng: np.random.Generator, words: tuple[bytes, ...] = (), most: int = 8) -> bytes:
    """`data` with one to `most` changes: bits, bytes, numbers, pieces moved, doubled, cut, or a word put in."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, most + 1))):
        place = int(rng.integers(0, len(out) + 1))
        length = int(min(2 ** rng.integers(0, 9), max(1, len(out) // 4)))
        kind = int(rng.integers(0, 8))
        if kind == 0 and place < len(out):
            out[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and place < len(out):
            out[place] = int(rng.choice(INTERESTING))
        elif kind == 2:
            out[place : place + 8] = NUMBERS[int(rng.integers(len(NUMBERS)))].to_bytes(8, "little")
        elif kind == 3:
            out[place : place + length] = rng.bytes(length)
        elif kind == 4:
            del out[place : place + length]
        elif kind == 5:
            other = int(rng.integers(0, len(out) + 1))
            out[place:place] = out[other : other + length]
        elif kind == 6 and words:
            out[place:place] = words[int(rng.integers(len(words)))]
        elif kind == 7:
            other = int(rng.integers(0, len(out) + 1))
            out[place : place + length] = out[other : other + length]
    return bytes(out)


def resealed(record: Any) -> bytes:
    """As `sealed`, also for what UTF-8 cannot hold."""
    try:
        return sealed(record)
    except (UnicodeEncodeError, TypeError):
        return json.dumps(record).encode()


def mutated_record(record: Any, rng: np.random.Generator) -> Any:
    """A JSON object with one value, anywhere in it, replaced by another."""
    values: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "../x"]
    values += ["\0", "\ud800", "9" * 100, [], [[]], {}, {"key": 1}]
    record = json.loads(json.dumps(record))
    for _ in range(int(rng.integers(1, 3))):
        holder: Any = record
        while True:
            places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not places:
                break
            place = places[int(rng.integers(len(places)))]
            if isinstance(holder[place], (dict, list)) and holder[place] and rng.random() < 0.7:
                holder = holder[place]
                continue
            if rng.random() < 0.15:
                del holder[place]
            else:
                # A copy: the same list twice could come to hold itself.
                holder[place] = copy.deepcopy(values[int(rng.integers(len(values)))])
            break
    return record
