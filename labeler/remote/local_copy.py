"""`LocalCopy`: a folder of the cache that fills with the files of a remote folder as they are needed."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from labeler.base.errors import IntegrityError
from labeler.remote.failures import NotThere
from labeler.remote.file_cache import FileCache
from labeler.remote.in_parallel import in_parallel
from labeler.remote.remote_files import RemoteFolder

PUT_AGAIN = "Put it there again, from where it is whole."
RECORD_BYTES = 256 << 20  # of a file that is read into memory


class LocalCopy:
    """What is here of a remote folder. Its files are pinned in the cache until `close`, or while this object lives.

    Args:
        url: URL of the remote folder.
        first: Name of the file whose content tells one version of the folder from another; it is read at once.
        cache: The cache; None: that of the environment.

    Attributes:
        path: The folder here. It is empty if there is no `first`.

    Raises:
        InputError: There is no permission, no driver, or the cache cannot be written.
        RemoteError: The service does not answer.
    """

    def __init__(self, url: str, first: str, cache: FileCache | None = None) -> None:
        self.remote, self.cache = RemoteFolder(url), cache or FileCache()
        data = read_record(self.remote, first)
        version = "nothing" if data is None else hashlib.sha256(data).hexdigest()
        self.path = self.cache.folder(self.remote.url, version)
        self.cache.pin(self.path)
        self._end = weakref.finalize(self, self.cache.release, self.path)
        if data is not None:
            self.cache.write(self.path, first, data)

    def close(self) -> None:
        """Lets the cache remove the files when it needs room."""
        self._end()

    @contextmanager
    def named(self) -> Iterator[None]:
        """Names the remote folder, not the files here, in errors of damage that the block raises."""
        with named(self.path, self.remote.url):
            yield

    def fetch_records(self, names: Sequence[str]) -> None:
        """Reads small files anew, several at a time; those that are no longer there are removed here."""

        def fetch(name: str) -> None:
            data = read_record(self.remote, name)
            if data is None:
                (self.path / name).unlink(missing_ok=True)
            else:
                self.cache.write(self.path, name, data)

        in_parallel(fetch, names, 16)

    def fetch(self, name: str, size: int | None, sha256: str) -> Path:
        """Returns a whole copy of a file, fetched on first use.

        Args:
            name: Its name.
            size: Its bytes; None: any number of them.
            sha256: Its digest.

        Returns:
            The path of the copy.

        Raises:
            IntegrityError: The remote file has another size or digest, or is not there.
            InputError: The cache has no room for it.
            RemoteError: The service does not answer.
        """
        path = self.cache.held(self.path, name, size, sha256)
        if path is not None:
            return path
        try:
            known = self.remote.identity(name)
        except NotThere:
            raise self._damaged(name, "no such file") from None
        if size is not None and known.size != size:
            raise self._damaged(name, f"{known.size} bytes", f"{size} bytes")
        return self.cache.fetch_into(self.path, self.remote, name, known, sha256)

    def _damaged(self, name: str, got: str, expected: str | None = None) -> IntegrityError:
        """The error of a remote file that is not as the records say."""
        url = self.remote.url_of(name)
        return IntegrityError(f"{url} is damaged", got=got, expected=expected, remedy=PUT_AGAIN)

    def fetch_all(self, files: Sequence[tuple[str, int, str]]) -> None:
        """Fetches files, several at a time; see `fetch` for what it raises. `files`: (name, size, sha256) of each."""
        missing = sum(size for name, size, _ in files if not (self.path / name).exists())
        self.cache.make_room(missing)
        in_parallel(lambda file: self.fetch(*file), files)

    def fetch_anew(self, name: str) -> Path:
        """Fetches a file of which no digest is known, whether a copy is here or not. Raises NotThere."""
        known = self.remote.identity(name)
        (self.path / name).unlink(missing_ok=True)
        return self.cache.fetch_into(self.path, self.remote, name, known)


@contextmanager
def named(folder: Path, url: str) -> Iterator[None]:
    """Names a URL in place of the folder here in errors of damage that the block raises."""
    try:
        yield
    except IntegrityError as error:
        problem = error.problem.replace(str(folder), url)
        raise IntegrityError(problem, got=error.got, expected=error.expected, remedy=PUT_AGAIN) from None


def read_record(remote: RemoteFolder, name: str) -> bytes | None:
    """Reads a small file into memory.

    Args:
        remote: The folder.
        name: Its name there.

    Returns:
        Its content; None if there is no such file.

    Raises:
        IntegrityError: It is larger than any record.
        RemoteError: The service does not answer.
    """
    try:
        known = remote.identity(name)
        if known.size is not None and known.size > RECORD_BYTES:
            raise IntegrityError(f"{remote.url_of(name)} is refused", got=f"{known.size:,} bytes", expected="a record")
        return remote.read(name, identity=known)
    except NotThere:
        return None
