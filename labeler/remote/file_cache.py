"""`FileCache`: whole copies of remote files on this machine, up to a limit of bytes.

A copy lies at `ROOT/files/<key of its folder>/<name>` and appears there by a rename, once it is whole. The copies that
were used the longest ago are removed to make room; those whose folder is pinned are not. Several processes may use one
cache: a short lock on `ROOT/lock` covers pinning and removing, and each process that pins has a file in `ROOT/pins`
whose lock it holds for as long as it lives, so what a killed process pinned is free again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from labeler.base.errors import InputError
from labeler.base.whole_files import TEMPORARY
from labeler.remote.file_systems import FileIdentity
from labeler.remote.remote_files import RemoteFolder

log = logging.getLogger("labeler")

FOLDER, BYTES = "TOKEN_LABELING_CACHE", "TOKEN_LABELING_CACHE_BYTES"  # environment variables
LIMIT = 50_000_000_000
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


def default_folder() -> Path:
    """Returns `$TOKEN_LABELING_CACHE`, else `~/.cache/token-labeling` (or below `$XDG_CACHE_HOME`)."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get(FOLDER) or Path(home) / "token-labeling")


def default_limit() -> int:
    """Returns `$TOKEN_LABELING_CACHE_BYTES`, such as 200G, in bytes; else 50 GB.

    Raises:
        InputError: The variable is not a number of bytes.
    """
    text = os.environ.get(BYTES)
    if not text:
        return LIMIT
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"{BYTES} is not a size", got=repr(text), expected="a number of bytes, such as 200G")
    return int(float(found[1]) * UNITS[found[2].upper()])


class FileCache:
    """Whole copies of remote files.

    Args:
        root: Folder of the cache; None: see `default_folder`.
        limit: Most bytes of all copies; None: see `default_limit`.
    """

    def __init__(self, root: str | Path | None = None, limit: int | None = None) -> None:
        self.root = default_folder() if root is None else Path(root)
        self.limit = default_limit() if limit is None else limit
        self._pins: tuple[int, TextIO] | None = None
        self._pinned: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "limit": self.limit}  # another process has its own pins

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def folder(self, *parts: str) -> Path:
        """Returns the folder of the copies that belong together, named by a digest of `parts`."""
        key = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self.root / "files" / key

    def copy_of(self, url: str, name: str, identity: FileIdentity) -> Path:
        """Returns where `fetch` puts a version of a file; `url`: that of its folder."""
        return self.folder(f"{url}/{name}", str(identity.size), identity.mark) / _file_name(name)

    def fetch(
        self, remote: RemoteFolder, name: str, identity: FileIdentity | None = None, sha256: str | None = None
    ) -> Path:
        """Returns a whole copy of a file, and pins it until `release(copy.parent)`.

        Args:
            remote: The folder that the file is in.
            name: Its name there.
            identity: The version to copy; None: the one that is there now.
            sha256: Its digest, where known; a copy that differs is fetched again.

        Returns:
            The path of the copy.

        Raises:
            IntegrityError: The remote file has another digest.
            InputError: The file does not fit into the cache, or there is none.
            RemoteError: The service does not answer, or the file changes.
        """
        known = identity or remote.identity(name)
        folder = self.copy_of(remote.url, name, known).parent
        self.pin(folder)
        try:
            return self.fetch_into(folder, remote, name, known, sha256)
        except BaseException:
            self.release(folder)
            raise

    def fetch_into(
        self, folder: Path, remote: RemoteFolder, name: str, identity: FileIdentity, sha256: str | None = None
    ) -> Path:
        """Returns a whole copy of a file in a folder that the caller has pinned; raises what `fetch` raises."""
        held = self.held(folder, name, identity.size, sha256)
        if held is not None:
            return held
        path = folder / _file_name(name)
        self.make_room(identity.size or 0)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            remote.download(name, temporary, identity, sha256)
            os.replace(temporary, path)  # another process may have been faster, with the same bytes
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{remote.url_of(name)} does not fit on the disk of the cache {str(self.root)!r}", got=error.strerror,
                remedy=f"Free some space, or set {FOLDER} to a folder on another disk.",
            ) from None  # fmt: skip
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def held(self, folder: Path, name: str, size: int | None, sha256: str | None) -> Path | None:
        """Returns the copy of a file in a folder that the caller has pinned; None if it is not here as it should be."""
        path = folder / _file_name(name)
        return path if self._is_good(path, size, sha256) else None

    def write(self, folder: Path, name: str, data: bytes) -> Path:
        """Writes a file into a folder that the caller has pinned, unless it has this content already."""
        path = folder / _file_name(name)
        try:
            if path.read_bytes() == data:
                return path
        except OSError:
            folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _is_good(self, path: Path, size: int | None, sha256: str | None) -> bool:
        """Whether a copy exists and is as it should be. One that is not is removed; one that is counts as used now."""
        try:
            status = path.stat()
            good = size in (None, status.st_size)
            if good and sha256 is not None:
                with open(path, "rb") as file:
                    good = hashlib.file_digest(file, "sha256").hexdigest() == sha256
            if good:
                os.utime(path)
                return True
        except FileNotFoundError:
            return False
        log.warning("%s is damaged and is fetched again", path)
        path.unlink(missing_ok=True)
        return False

    def pin(self, folder: Path) -> None:
        """Keeps the copies of a folder until `release`, or the end of this process."""
        with self._locked():
            self._note(f"+{folder.name}")
            self._pinned[folder.name] += 1

    def release(self, folder: Path) -> None:
        """Ends one `pin` of a folder by this process. A fork's release of its parent's pin does nothing."""
        if self._pins is None or self._pins[0] != os.getpid() or not self._pinned[folder.name]:
            return
        with suppress(InputError), self._locked():
            self._note(f"-{folder.name}")
            self._pinned[folder.name] -= 1

    def _note(self, line: str) -> None:
        """Adds a line to this process's file of pins. Only under the lock."""
        if self._pins is None or self._pins[0] != os.getpid():
            self._pinned.clear()
            (self.root / "pins").mkdir(parents=True, exist_ok=True)
            file = open(self.root / "pins" / f"{os.getpid()}-{secrets.token_hex(4)}", "w")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX)
            self._pins = (os.getpid(), file)
        print(line, file=self._pins[1], flush=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock of the cache."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = open(self.root / "lock", "w")  # noqa: SIM115
        except OSError as error:
            raise InputError(
                f"the cache {str(self.root)!r} cannot be written", got=error.strerror,
                remedy=f"Set {FOLDER} to a folder of yours.",
            ) from None  # fmt: skip
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _all_pinned(self) -> set[str]:
        """Returns the folders that living processes have pinned. Only under the lock."""
        pinned: set[str] = set()
        for path in (self.root / "pins").glob("*"):
            held: Counter[str] = Counter()
            for line in self._living_pins(path):
                held[line[1:]] += 1 if line[0] == "+" else -1
            pinned |= {name for name, count in held.items() if count > 0}
        return pinned

    def _living_pins(self, path: Path) -> list[str]:
        """Returns the lines of a file of pins; none, and the file is removed, if its process has ended."""
        if self._pins is None or path.name != Path(self._pins[1].name).name:
            try:
                with open(path, "r+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    return []
            except FileNotFoundError:
                return []
            except OSError:  # its process holds the lock, or is another user's
                pass
        return path.read_text().splitlines()

    def make_room(self, wanted: int) -> None:
        """Removes the copies that were used the longest ago, until `wanted` bytes more fit.

        Raises:
            InputError: They do not fit: too much is in use.
        """
        with self._locked():
            pinned, files, used = self._all_pinned(), [], 0
            for entry in self._entries():
                with suppress(FileNotFoundError):  # a download that has just ended
                    status = entry.stat()
                    used += status.st_size
                    if Path(entry.path).parent.name not in pinned:
                        files.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
            for _, size, path in sorted(files):
                if used + wanted <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= size
                with suppress(OSError):  # not empty yet
                    path.parent.rmdir()
        if used + wanted > self.limit:
            raise InputError(
                f"the cache {str(self.root)!r} is too small",
                got=f"{wanted:,} bytes more beside {used:,} that are in use", expected=f"{self.limit:,} in all",
                remedy=f"Set {BYTES} higher, such as {BYTES}=200G.",
            )  # fmt: skip

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """Yields all files of the cache, those that are being written included."""
        with suppress(FileNotFoundError):
            for folder in os.scandir(self.root / "files"):
                with suppress(FileNotFoundError, NotADirectoryError):
                    yield from (entry for entry in os.scandir(folder.path) if entry.is_file())

    def clear(self) -> None:
        """Removes all copies that no process has pinned."""
        with self._locked():
            pinned = self._all_pinned()
            with suppress(FileNotFoundError):
                for folder in list(os.scandir(self.root / "files")):
                    if folder.name not in pinned:
                        shutil.rmtree(folder.path, ignore_errors=True)


def _file_name(name: str) -> str:
    """Returns the name of a copy: that of the file, with a digest where it has unusual characters."""
    last = name.rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", last).lstrip(".") or "file"
    if plain == last and len(plain) <= 150:
        return plain
    return f"{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}-{plain[-100:]}"
