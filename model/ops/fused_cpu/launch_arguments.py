"""The records that the CPU kernels are called with, known to both sides without Numba: one of integers per call.

Legend: K directions, B batch, L length, E inner width, N state size, W taps of the convolution.
Sizes are numbers, tensors addresses (0: there is none), and strides are counted in elements, in the order of the axes.
"""

from __future__ import annotations

import numpy as np

CHUNK = 16  # steps between saved states, and steps of one work item of the mixer's forward kernels
TILE = 32  # steps of one work item of the convolution's backward pass
WIDEST = 32  # lanes of a vector: a multiple of those on any machine
GROUP = 64  # channels of one work item of the scan's backward pass; a multiple of any number of lanes
# What every record begins with; `next_item` and `next_slot` are addresses of integers that the threads share.
LAUNCH = ("items", "slot_bytes", "next_item", "next_slot", "scratch", "reverse")
SIZES = ("directions", "batch", "length", "width", "padded")

SCAN_STRIDED = {"u": "kble", "delta": "kble", "grad_y": "kble", "A": "ken", "B": "kbln", "C": "kbln", "D": "ke"}
SCAN_STRIDED["bias"] = "ke"
SCAN_DENSE = ("y", "saved", "gu", "gdelta", "gA", "gB", "gC", "gD", "gbias")

MIXER_STRIDED = {"x": "ble", "grad_u": "kble", "y": "kble", "z": "ble", "grad_out": "ble"}
MIXER_DENSE = ("factor", "taps", "u", "gx", "gtaps", "out", "gy", "gz")
CONV, CONV_BACKWARD, GATE = range(3)  # kinds of work of the mixer's kernel


def _record(sizes: tuple[str, ...], strided: dict[str, str], dense: tuple[str, ...]) -> np.dtype:
    strides = [f"{name}_{axis}" for name, axes in strided.items() for axis in axes]
    return np.dtype([(name, np.int64) for name in (*LAUNCH, *SIZES, *sizes, *strided, *dense, *strides)])


SCAN = _record(("states", "softplus"), SCAN_STRIDED, SCAN_DENSE)
MIXER = _record(("kind", "window"), MIXER_STRIDED, MIXER_DENSE)


def scan_rows(states: int) -> int:
    """Vectors of work space for one thread of the scan, at any number of lanes."""
    return 3 * states * (GROUP // 16) + CHUNK * states + 16 * CHUNK + 16


def padded_width(width: int) -> int:
    """Channels in saved states and packed weights: whole vectors on any machine."""
    return (width + WIDEST - 1) // WIDEST * WIDEST
