"""Lets one thread use torch without OpenMP's other threads.

With the cores busy, as beside threads that decode images, a small operator in two threads takes longer than in one: the
first waits, spinning, until the second has its turn on a core.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch's operators, called by this thread inside the block, run in this thread alone.

    `torch.set_num_threads` would also change the number for other threads, and empty oneDNN's caches. Does nothing
    where torch has other threads than OpenMP's.
    """
    openmp, mkl = _set_threads()
    if openmp is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    openmp(1)
    of_mkl = mkl(1) if mkl else 0
    try:
        yield
    finally:
        openmp(before)
        if mkl:
            mkl(of_mkl)


@functools.cache
def _set_threads() -> tuple[Any, Any]:
    """Returns OpenMP's and MKL's functions that set the number of threads for the calling thread; None: absent."""
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None, None
    return getattr(library, "omp_set_num_threads", None), getattr(library, "MKL_Set_Num_Threads_Local", None)
