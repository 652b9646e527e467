"""Whether the CPU kernels can run on this machine, where they are kept once compiled, and who runs them.

Compiling takes seconds, so machine code is kept in a folder of the user's cache, one for each text of the kernels and
version of Numba; `NUMBA_CACHE_DIR` names another place. Without a folder to write to, every process compiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

OLDEST = (0, 65)  # version of Numba
ALIGNMENT = 64  # of work spaces, in bytes: a line of the cache

logger = logging.getLogger(__name__)
_compiling = threading.Lock()


class Kernel:
    """A compiled kernel, `lanes` channels at a time."""

    def __init__(self, compiled: Any, lanes: int) -> None:
        self.lanes = lanes
        self._compiled = compiled  # keeps the machine code
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)

    def run(self, layout: np.dtype, values: Mapping[str, int], items: int, rows: int, dtype: torch.dtype) -> None:
        """Have torch's threads run the kernel on `items` work items, without Python's lock.

        Args:
            layout: Of the record of arguments, one of `launch_arguments`.
            values: The record's values beyond those of the launch; what is missing is 0.
            items: Number of work items.
            rows: Vectors of work space that a thread needs.
            dtype: Of the vectors.
        """
        threads = min(torch.get_num_threads(), items)
        slot = math.ceil(rows * self.lanes * dtype.itemsize / ALIGNMENT) * ALIGNMENT
        scratch = torch.empty(threads * slot + ALIGNMENT, dtype=torch.uint8)
        counters = np.zeros(2, np.int64)
        launch = {
            "items": items, "slot_bytes": slot, "scratch": -(-scratch.data_ptr() // ALIGNMENT) * ALIGNMENT,
            "next_item": counters.ctypes.data, "next_slot": counters.ctypes.data + counters.itemsize,
        }  # fmt: skip
        record = np.array([tuple((launch | dict(values)).get(name, 0) for name in layout.names or ())], layout)
        if threads == 1:
            self._function(record.ctypes.data)
        elif threads > 1:
            _team()(self._compiled.address, record.ctypes.data, threads, 0)


@functools.cache
def is_available() -> tuple[bool, str]:
    """Whether the kernels can be compiled here, and the version of Numba or the reason why not."""
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return False, "numba is not installed; pip install numba"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        wanted = ".".join(str(part) for part in OLDEST)
        return False, f"numba {version} is too old; pip install 'numba>={wanted}'"
    try:
        _import("scan_kernels")
    except Exception as error:  # it refuses a numpy that it does not know, for one
        return False, f"numba {version} cannot be imported ({type(error).__name__}: {error})"
    try:
        _team()
    except (OSError, AttributeError) as error:
        return False, f"torch's operators do not run in OpenMP threads here ({error})"
    return True, f"numba {version}"


@functools.cache
def kernel(family: str, name: str) -> Kernel:
    """Compile the kernel `name` of the file `{family}_kernels`, or read it from the cache."""
    kernels, work_space, folder = _import(f"{family}_kernels"), _import("work_space"), cache_folder()
    with _compiling, _one_process(folder):
        compiled = work_space.compile_kernel(getattr(kernels, name), None if folder is None else str(folder))
        return Kernel(compiled, work_space.LANES)


@functools.cache
def cache_folder() -> Path | None:
    """The folder for machine code; None, with a line in the log, if none can be written to."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = os.environ.get("NUMBA_CACHE_DIR") or os.path.join(home, "token-labeling", "numba")
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    versions = f"{importlib.metadata.version('numba')} {importlib.metadata.version('llvmlite')} {sys.version_info[:2]}"
    folder = Path(place) / f"kernels-{hashlib.sha256(text + versions.encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning(
            "the CPU kernels are compiled anew by every process, since %s cannot be written to (%s); "
            "NUMBA_CACHE_DIR names another folder",
            folder,
            error.strerror or error,
        )
        return None


@contextlib.contextmanager
def _one_process(folder: Path | None) -> Iterator[None]:
    """Let one process at a time compile into a folder; the next ones find what it has written."""
    if folder is None:
        yield
        return
    import fcntl

    with open(folder / "lock", "a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _team() -> Any:
    """OpenMP's function that runs a C function in all threads of the team, from the library that torch uses."""
    libraries = Path(torch.__file__).parent / "lib"
    run = ctypes.CDLL(str(libraries / "libtorch_cpu.so")).GOMP_parallel
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")
