"""Makes malloc keep freed memory for the tensors of the next batch or step.

By default glibc returns tensors of a few megabytes or more to the system at once, so every batch begins with tens of
thousands of page faults: a fifth of a teacher's time on a CPU, a tenth of a training step's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
TRIM_BY_DEFAULT, MMAPS_BY_DEFAULT = 128 << 10, 65_536


def keep_freed_memory() -> bool:
    """Makes this process keep its freed memory: it stays as large as at its peak.

    Returns:
        False if nothing was changed: with another malloc than glibc's, or where the user has configured malloc.
    """
    mallopt = _mallopt()
    if mallopt is None or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    return True


@contextmanager
def freed_memory_kept(wanted: bool = True) -> Iterator[None]:
    """Keeps freed memory inside the block if `wanted`; afterwards, free memory goes back to the system."""
    kept = wanted and keep_freed_memory()
    try:
        yield
    finally:
        mallopt = _mallopt()
        if kept and mallopt is not None:
            mallopt(M_MMAP_MAX, MMAPS_BY_DEFAULT)
            mallopt(M_TRIM_THRESHOLD, TRIM_BY_DEFAULT)
            ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> Callable[[int, int], int] | None:
    """Returns glibc's `mallopt`; None with another malloc."""
    try:
        return ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return None
