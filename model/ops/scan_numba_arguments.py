"""What the CPU kernels of the scan are called with, known to both sides: one record in memory, without Numba.

Legend: K directions, B batch, L length, E inner width, N state size.
"""

from __future__ import annotations

import numpy as np

CHUNK = 16  # steps between saved states
WIDEST = 32  # lanes of a vector: a multiple of those on any machine
GROUP = 64  # channels of one work item of the backward pass; a multiple of any number of lanes
SIZES = ("directions", "batch", "length", "width", "padded", "states", "softplus", "items", "slot_bytes")
COUNTERS = ("next_item", "next_slot")  # addresses of integers that the threads share
# Strides are counted in elements, in the order of each tensor's axes.
STRIDED = {"u": "kble", "delta": "kble", "grad_y": "kble", "A": "ken", "B": "kbln", "C": "kbln", "D": "ke"}
STRIDED["bias"] = "ke"
DENSE = ("y", "saved", "gu", "gdelta", "gA", "gB", "gC", "gD", "gbias", "reverse", "scratch")
FIELDS = [*SIZES, *COUNTERS, *STRIDED, *DENSE, *(f"{name}_{axis}" for name, axes in STRIDED.items() for axis in axes)]
ARGUMENTS = np.dtype([(name, np.int64) for name in FIELDS])  # an absent tensor's address is 0


def scratch_rows(states: int) -> int:
    """Vectors of work space for one thread, at any number of lanes."""
    return 3 * states * (GROUP // 16) + CHUNK * states + 16 * CHUNK + 16


def padded_width(width: int) -> int:
    """Channels in saved states: whole vectors on any machine."""
    return (width + WIDEST - 1) // WIDEST * WIDEST
