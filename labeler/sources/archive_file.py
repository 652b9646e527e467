"""`ArchiveFile`: a tar or parquet file, here or behind a URL, in the version that was listed.

A remote tar file is copied whole into the cache when it is first read, and a remote parquet file is read in parts.
"""

from __future__ import annotations

import errno
import functools
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from labeler.base.errors import InputError
from labeler.remote.file_cache import FileCache, default_folder, default_limit
from labeler.remote.file_systems import FileIdentity
from labeler.remote.remote_files import RemoteFolder
from labeler.remote.urls import is_url, split_url

T = TypeVar("T")


@dataclass(frozen=True)
class ArchiveFile:
    """An archive.

    Attributes:
        where: Its path or URL.
        identity: The version behind a URL; None: a local file.
    """

    where: str
    identity: FileIdentity | None = None

    @property
    def version(self) -> str:
        """A text that tells it from its other versions. Raises OSError if a local file is not there."""
        if self.identity is not None:
            return f"{self.where} {self.identity.size} {self.identity.mark}"
        status = os.stat(self.where)
        return f"{os.path.realpath(self.where)} {status.st_size} {status.st_mtime_ns}"

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return Path(self.where.partition("?")[0]).stem

    def absolute(self) -> ArchiveFile:
        """Returns the same archive, for a process that works in another folder."""
        return self if self.identity is not None else ArchiveFile(os.path.abspath(self.where))

    def read_copy(self, read: Callable[[str], T]) -> T:
        """Returns `read(path)` of the local file, or of a whole copy in the cache.

        Raises:
            OSError: The file cannot be read.
            RemoteError: The service does not answer, or has another version.
            InputError: The copy does not fit into the cache.
        """
        if self.identity is None:
            return read(self.where)
        folder, name = split_url(self.where)
        files = cache()
        copy = files.copy_of(folder, name, self.identity)
        for _ in range(3):
            try:
                return read(str(copy))
            except FileNotFoundError:  # not there yet, or removed since to make room
                files.release(files.fetch(RemoteFolder(folder), name, self.identity).parent)
        return read(str(copy))

    def open(self) -> BinaryIO:
        """Opens it for reads anywhere in it."""
        return open(self.where, "rb") if self.identity is None else io.BufferedReader(_RemoteReader(self), 1 << 20)

    def exists(self) -> bool:
        """Whether it is there; a URL counts as there."""
        return self.identity is not None or os.path.exists(self.where)


def open_archive(where: str) -> ArchiveFile:
    """Looks at an archive.

    Raises:
        InputError: It is not there, or cannot be read.
        RemoteError: Its service does not answer.
    """
    if is_url(where):
        folder, name = split_url(where)
        return ArchiveFile(where, RemoteFolder(folder).identity(name))
    return ArchiveFile(where)


class _RemoteReader(io.RawIOBase):
    """A file behind a URL, as a file object."""

    def __init__(self, archive: ArchiveFile) -> None:
        assert archive.identity is not None
        folder, self._name = split_url(archive.where)
        self._remote, self._identity, self._position = RemoteFolder(folder), archive.identity, 0
        if self._identity.size is None:
            raise InputError(
                f"{archive.where} cannot be read in parts", got="no size", expected="a server that tells it"
            )
        self._size = self._identity.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "a position before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._size - self._position))
        data = self._remote.read(self._name, self._position, size, self._identity) if size else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def cache() -> FileCache:
    """Returns this process's cache."""
    return _cache(default_folder(), default_limit())


@functools.cache
def _cache(folder: Path, limit: int) -> FileCache:
    return FileCache(folder, limit)
