"""A bounded pool of open files, for random reads in a store of thousands of shards."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from labeler.base.errors import InputError

T = TypeVar("T")
MOST_OPEN = 256
SHARE_OF_LIMIT = 4  # at most a quarter of the files that a process may open


class OpenFile:
    """A file that is open for reading. It is closed once nothing refers to it, so never while a thread reads it."""

    def __init__(self, path: Path) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        """Reads `size` bytes from `offset` on; fewer at the end of the file."""
        return os.pread(self.handle, size, offset)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class OpenFiles:
    """Keeps the most recently used files open. Safe with threads and after a fork, without a lock.

    Args:
        most: Most files to keep open; None: 256, or a quarter of this process's limit if that is less.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = _most_open() if most is None else most
        self._open: dict[Path, OpenFile] = {}  # the most recently used last

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: Path) -> OpenFile:
        """Returns the open file.

        Raises:
            OSError: The file cannot be opened.
            InputError: This process cannot open more files.
        """
        file = self._open.get(path)
        if file is None:
            file = self.retried(lambda: OpenFile(path), path)
        # Each step is atomic. If two threads open the same file, one of them has its own copy until it is done.
        self._open.pop(path, None)
        self._open[path] = file
        while len(self._open) > self.most:
            try:
                self._open.pop(next(iter(self._open)), None)
            except (StopIteration, RuntimeError):  # another thread was faster
                break
        return file

    def retried(self, opening: Callable[[], T], path: Path) -> T:
        """Returns `opening()`; if the process has too many open files, closes those kept here and tries again."""
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
                got=f"{error.strerror}, {kept} of them the store's own",
                expected="room for a few more",
                remedy='Raise the limit on open files (ulimit -n), or read with cache="ram-compressed".',
            ) from None

    def close(self) -> None:
        """Closes all files that no thread is reading."""
        self._open.clear()


def _most_open() -> int:
    """Returns how many files to keep open by default."""
    try:
        import resource
    except ImportError:  # not on Windows
        return MOST_OPEN
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if allowed == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, allowed // SHARE_OF_LIMIT))
