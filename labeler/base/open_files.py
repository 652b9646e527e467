"""A bounded number of open files, for a store of thousands of shards that are read at random."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from labeler.base.errors import InputError

T = TypeVar("T")
MOST_OPEN = 256
SHARE_OF_LIMIT = 4  # of the files that a process may open, a quarter at most


class OpenFile:
    """A file open for reading. It is closed when nobody holds it, so never while a thread reads from it."""

    def __init__(self, path: Path) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.handle, size, offset)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class OpenFiles:
    """Keeps open those files that were used last. Safe from several threads, and after a fork: it needs no lock.

    most  files; None: 256, or a quarter of what this process may open where that is less
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = _most_open() if most is None else most
        self._open: dict[Path, OpenFile] = {}  # the last used last

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: Path) -> OpenFile:
        """The open file. Raises OSError, or InputError where this process can open no more."""
        file = self._open.get(path)
        if file is None:
            file = self.retried(lambda: OpenFile(path), path)
        # Each step is whole by itself; of two threads that open the same file one keeps it to itself until it is done.
        self._open.pop(path, None)
        self._open[path] = file
        while len(self._open) > self.most:
            try:
                self._open.pop(next(iter(self._open)), None)
            except (StopIteration, RuntimeError):  # another thread was there
                break
        return file

    def retried(self, opening: Callable[[], T], path: Path) -> T:
        """`opening()`; where it fails for want of files, again without those kept open here."""
        try:
            return opening()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        kept = len(self)
        self.close()
        try:
            return opening()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise InputError(
                f"no more files can be opened in {str(path.parent)!r}",
                got=f"{error.strerror}, of which {kept} were the store's own",
                expected="room for a few",
                remedy='Raise the limit on open files (ulimit -n), or read with cache="ram-compressed".',
            ) from None

    def close(self) -> None:
        self._open.clear()


def _most_open() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return MOST_OPEN
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if allowed == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, allowed // SHARE_OF_LIMIT))
