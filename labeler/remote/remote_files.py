"""`RemoteFolder`: the files below a URL, read in ranges and written whole.

Any URL that fsspec knows will do: `s3://`, `gs://`, `hf://`, `https://`, `file://`, `memory://` … Requests are tried
again after dropped connections, time-outs and answers 5xx. An answer of another length than asked for is tried again,
then refused. A file that has changed since it was first looked at is refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from labeler.base.errors import InputError, IntegrityError, RemoteError
from labeler.base.whole_files import TEMPORARY
from labeler.remote.failures import NotThere, Patience, TryAgain, retried
from labeler.remote.file_systems import (
    OBJECT_STORES,
    FileIdentity,
    identity_of,
    open_file_system,
    version_text,
    write_whole,
)
from labeler.remote.hub import is_hub, send_in_commits, size_of
from labeler.remote.in_parallel import in_parallel
from labeler.remote.urls import split_url, stays_below

log = logging.getLogger("labeler")

BLOCK = 16 << 20  # bytes of one request of a download


class RemoteFolder:
    """The files below a URL. It can be used from several threads, pickled, and used after a fork.

    Args:
        url: URL of the folder.
        patience: How long to try; None: 6 tries, within three minutes.

    Raises:
        InputError: The URL's kind is not known, or its driver is not installed.
    """

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        self.url, self.patience = url.rstrip("/"), patience or Patience()
        self.protocol = url.partition("://")[0].lower()
        self._opened: tuple[int, Any, str] | None = None
        self._fs  # noqa: B018  # a missing driver is named at once

    def __repr__(self) -> str:
        return f"RemoteFolder({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def _fs(self) -> tuple[Any, str]:
        """fsspec's file system and the folder's path in it; new after a fork, which its threads do not survive."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *open_file_system(self.url, self.protocol))
        return self._opened[1], self._opened[2]

    def url_of(self, name: str) -> str:
        """Returns the URL of a file."""
        return f"{self.url}/{name}"

    def _path(self, name: str) -> str:
        """Returns the path of a file as the driver takes it. Raises InputError for a name that leaves the folder."""
        if not stays_below(name.partition("?")[0]):
            raise InputError(f"{name!r} is not a name below {self.url}")
        if self.protocol in ("http", "https") and "?" not in name:
            name = quote(name)
        return f"{self._fs[1]}/{name}"

    def _retried(self, name: str | None, action: Callable[[Any, str], Any]) -> Any:
        """Returns `action(file system, path)` with retries; `name` None: the folder itself."""
        if name is None:
            return retried(self.url, lambda: action(*self._fs), self.patience)
        return retried(self.url_of(name), lambda: action(self._fs[0], self._path(name)), self.patience)

    def identity(self, name: str) -> FileIdentity:
        """Looks at a file, without any cache.

        Args:
            name: Its name below the folder.

        Returns:
            Its version.

        Raises:
            NotThere: There is no such file.
            InputError: There is no permission.
            RemoteError: The service does not answer.
        """

        def look(fs: Any, path: str) -> FileIdentity:
            fs.invalidate_cache()
            return identity_of(fs.info(path), self.url_of(name))

        return self._retried(name, look)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name. Raises what `identity` raises, but NotThere."""
        try:
            self.identity(name)
        except NotThere:
            return False
        return True

    def files(self, below: bool = False) -> dict[str, FileIdentity]:
        """Returns name -> version of the files right in the folder; empty if there is no folder.

        Names come from the service: those that are no plain file name are left out.

        Args:
            below: Files in folders of the folder as well; their names are paths.
        """

        def look(fs: Any, path: str) -> list[dict[str, Any]]:
            fs.invalidate_cache()
            return list(fs.find(path, detail=True).values()) if below else fs.ls(path, detail=True)

        try:
            entries = self._retried(None, look)
        except NotThere:
            return {}
        files = {}
        for entry in entries:
            where = str(entry.get("name", "")).rstrip("/")
            name = self._below(where) if below else split_url(where)[1]
            if entry.get("type") == "file" and stays_below(name) and TEMPORARY not in name:
                files[name] = identity_of(entry, self.url_of(name))
        return files

    def _below(self, where: str) -> str:
        """Returns the name of a file from where its service says that it is."""
        root = self._fs[1].strip("/")
        name = where.strip("/").removeprefix(root).lstrip("/")
        return unquote(name) if self.protocol in ("http", "https") else name

    def read(self, name: str, offset: int = 0, size: int | None = None, identity: FileIdentity | None = None) -> bytes:
        """Reads a part of a file.

        Args:
            name: Its name below the folder.
            offset: First byte.
            size: Number of bytes; None: to the end.
            identity: The version to read; None: whichever there is now.

        Returns:
            The bytes, never fewer than asked for.

        Raises:
            NotThere: There is no such file.
            RemoteError: The file has changed, is shorter than asked for, or the service does not answer.
        """
        known = identity or self.identity(name)
        if size is None and known.size is not None:
            size = known.size - offset
        return self.read_ranges(name, [(offset, size)], known)[0]

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int | None]], identity: FileIdentity) -> list[bytes]:
        """Reads several parts of a file, and looks once whether it is still the same file.

        Args:
            name: Its name below the folder.
            ranges: (first byte, number of bytes) of each part; None: to the end.
            identity: The version to read.

        Returns:
            The parts, each as long as asked for.

        Raises:
            NotThere: There is no such file.
            RemoteError: The file has changed, is shorter than asked for, or the service does not answer.
        """
        parts = [self._part(name, offset, size, identity) for offset, size in ranges]
        self.refuse_changed(name, identity)
        return parts

    def _part(self, name: str, offset: int, size: int | None, identity: FileIdentity) -> bytes:
        """Reads one part, without looking whether the file has changed."""
        end = None if size is None else offset + size
        if end is not None and identity.size is not None and end > identity.size:
            raise RemoteError(
                f"{self.url_of(name)} is too short", got=f"{identity.size} bytes", expected=f"{end} or more"
            )
        if size == 0:
            return b""

        def get(fs: Any, path: str) -> bytes:
            whole = offset == 0 and end in (None, identity.size)
            data = fs.cat_file(path) if whole else fs.cat_file(path, start=offset, end=end)
            if size is not None and len(data) == identity.size and len(data) != size:
                return data[offset:end]  # a server without ranges sends the whole file
            if size is not None and len(data) != size:
                raise TryAgain(f"{len(data)} bytes instead of {size} from byte {offset} on")
            return data

        return self._retried(name, get)

    def refuse_changed(self, name: str, identity: FileIdentity) -> None:
        """Raises RemoteError if a file is not the one that it was."""
        now = self.identity(name)
        if now != identity:
            raise RemoteError(
                f"{self.url_of(name)} has changed while it was read",
                got=version_text(now),
                expected=version_text(identity),
                remedy="Start again with the file that is there now.",
            )

    def download(self, name: str, to: Path, identity: FileIdentity | None = None, sha256: str | None = None) -> str:
        """Writes a file here. After a dropped connection it goes on where it was.

        Args:
            name: Its name below the folder.
            to: Path of the file to write; it is not whole before this returns.
            identity: The version to read; None: whichever there is now.
            sha256: Its digest, where known.

        Returns:
            The sha256 of what was written.

        Raises:
            IntegrityError: The file has another digest, also when it is read once more.
            NotThere: There is no such file.
            RemoteError: The file has changed, or the service does not answer.
        """
        known = identity or self.identity(name)
        for last in (False, True):
            found = self._download(name, to, known)
            self.refuse_changed(name, known)
            if sha256 in (None, found):
                return found
            if not last:
                log.warning(
                    "%s has sha256 %.12s… instead of %.12s…; reading it once more", self.url_of(name), found, sha256
                )
        raise IntegrityError(
            f"{self.url_of(name)} is damaged", got=f"sha256 {found[:12]}", expected=f"sha256 {str(sha256)[:12]}",
            remedy="It was read twice. Put the right file there again.",
        )  # fmt: skip

    def _download(self, name: str, to: Path, identity: FileIdentity) -> str:
        """Writes all blocks of a file and returns its sha256."""
        digest = hashlib.sha256()
        with open(to, "wb") as file:
            for offset, size in _blocks(identity.size):
                data = self._part(name, offset, size, identity)
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def put(self, name: str, source: Path | bytes) -> None:
        """Writes a whole file; readers see the old file or the new one, wherever the service allows it.

        Args:
            name: Its name below the folder.
            source: The file to send, or its content.

        Raises:
            InputError: There is no permission, or the service can only be read.
            RemoteError: The service does not answer, or has another size afterwards.
        """
        if self.protocol in ("http", "https"):
            raise InputError(f"{self.url} can only be read", remedy="Choose a service that files can be sent to.")
        size = len(source) if isinstance(source, bytes) else source.stat().st_size

        def send(fs: Any, path: str) -> None:
            write_whole(fs, self.protocol, path, source)
            fs.invalidate_cache()
            there = fs.info(path).get("size")
            if there != size:
                raise TryAgain(f"{there} bytes there after {size} were sent")

        self._retried(name, send)

    def put_all(
        self, files: Sequence[tuple[str, Path | bytes]], sent: Callable[[int], None] = lambda size: None
    ) -> None:
        """Writes several files, in no particular order; on the Hugging Face Hub in few commits.

        Args:
            files: (name below the folder, file to send or its content) of each.
            sent: Called with the bytes of what has been sent.

        Raises:
            InputError: There is no permission, or the service can only be read.
            RemoteError: The service does not answer.
        """
        if not files:
            return
        if is_hub(self.url):
            send_in_commits(self.url, files, self.patience, sent, "token-labeling push")
            return

        def send(file: tuple[str, Path | bytes]) -> None:
            self.put(*file)
            sent(size_of(file[1]))

        in_parallel(send, files)

    def sweep(self, names: Collection[str]) -> None:
        """Removes what writers of these files that were killed have left, where files get their names by renaming."""
        if self.protocol in OBJECT_STORES or is_hub(self.url):
            return
        fs, folder = self._fs
        for path in [str(entry["name"]) for entry in fs.ls(folder, detail=True)]:
            name = path.rpartition("/")[2]
            if name.startswith(TEMPORARY) and name[len(TEMPORARY) :].rpartition("-")[0] in names:
                with suppress(FileNotFoundError):
                    fs.rm_file(path)

    def delete(self, name: str) -> None:
        """Removes a file; nothing happens if there is none."""
        with suppress(NotThere):
            self._retried(name, lambda fs, path: fs.rm_file(path))


def _blocks(size: int | None) -> Iterator[tuple[int, int | None]]:
    """Yields (offset, size) of the blocks of a file; one that goes to the end if its size is not known."""
    if size is None:
        yield 0, None
        return
    for offset in range(0, size, BLOCK):
        yield offset, min(BLOCK, size - offset)
