"""Rows of channels between memory and a thread's work space, and how kernels are compiled.

A row is one vector of channels. The work space is addressed by the index of an element.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cfunc, config, njit, types

from model.ops.fused_cpu.vectors import LANES, load, read, store, write


@njit
def read_rows(space, rows, source, start, step, stride, count, lanes, zero):
    """Copy `count` rows, `step` elements apart, to the work space; lanes beyond the width become 0."""
    for i in range(count):
        if lanes == LANES and stride == 1:
            store(space, rows + i * LANES, load(source, start + i * step, zero))
        else:
            for lane in range(lanes):
                write(space, rows + i * LANES + lane, read(source, start + i * step + lane * stride, zero))
            for lane in range(lanes, LANES):
                write(space, rows + i * LANES + lane, zero)


@njit
def write_row(target, start, value, lanes, space, spare, zero):
    """Write the lanes of a vector that are within the width."""
    if lanes == LANES:
        store(target, start, value)
    else:
        store(space, spare, value)
        for lane in range(lanes):
            write(target, start + lane, read(space, spare + lane, zero))


def compile_kernel(function: Callable[[int], None], folder: str | None) -> Any:
    """Compile a kernel, or read it from the cache.

    Args:
        function: the kernel, a function of one pointer in a file, as the cache goes by names.
        folder: of the cache; None: none.

    Returns:
        An object whose `address` is that of a C function of one pointer; the function lives as long as the object.
    """
    previous = config.CACHE_DIR
    config.CACHE_DIR = folder or ""
    try:
        return cfunc(types.void(types.voidptr), cache=folder is not None)(function)
    finally:
        config.CACHE_DIR = previous
