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
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

OLDEST = (0, 65)  # version of Numba
FILES = ("scan_numba_arguments.py", "scan_numba_kernels.py", "scan_numba_vectors.py")

logger = logging.getLogger(__name__)
_compiling = threading.Lock()


class Kernel:
    """A compiled kernel, `lanes` channels at a time."""

    def __init__(self, compiled: Any, lanes: int) -> None:
        self.lanes = lanes
        self._compiled = compiled  # keeps the machine code
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)

    def run(self, arguments: np.ndarray, threads: int) -> None:
        """Have that many of torch's threads run the kernel on one record of arguments, without Python's lock."""
        if threads == 1:
            self._function(arguments.ctypes.data)
        elif threads > 1:
            _team()(self._compiled.address, arguments.ctypes.data, threads, 0)


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
        _kernels()
    except Exception as error:  # it refuses a numpy that it does not know, for one
        return False, f"numba {version} cannot be imported ({type(error).__name__}: {error})"
    try:
        _team()
    except (OSError, AttributeError) as error:
        return False, f"torch's operators do not run in OpenMP threads here ({error})"
    return True, f"numba {version}"


@functools.cache
def kernel(name: str) -> Kernel:
    """Compile one of the kernels of `scan_numba_kernels`, or read it from the cache."""
    kernels, folder = _kernels(), cache_folder()
    with _compiling, _one_process(folder):
        return Kernel(kernels.compile_kernel(name, None if folder is None else str(folder)), kernels.LANES)


@functools.cache
def cache_folder() -> Path | None:
    """The folder for machine code; None, with a line in the log, if none can be written to."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = os.environ.get("NUMBA_CACHE_DIR") or os.path.join(home, "token-labeling", "numba")
    text = b"".join((Path(__file__).parent / name).read_bytes() for name in FILES)
    versions = f"{importlib.metadata.version('numba')} {importlib.metadata.version('llvmlite')} {sys.version_info[:2]}"
    folder = Path(place) / f"scan-{hashlib.sha256(text + versions.encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning(
            "the scan's kernels are compiled anew by every process, since %s cannot be written to (%s); "
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


def _kernels() -> ModuleType:
    return importlib.import_module("model.ops.scan_numba_kernels")
