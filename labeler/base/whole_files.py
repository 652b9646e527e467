"""Atomic file writes: each file is either absent or complete, whatever crashes in between."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import xxhash

from labeler.base.errors import IntegrityError, LabelingError
from labeler.base.signals import unfinished_files

TEMPORARY = ".tmp-"


def replace_file(path: Path, data: bytes) -> None:
    """Atomically replaces the content of `path` with `data`; durable on return."""
    _publish(path, data, os.rename)


@contextmanager
def text_written_whole(path: Path) -> Iterator[TextIO]:
    """Yields a text file that becomes `path` at the end of the block; if the block raises, `path` is unchanged."""
    with _temporary_file(path) as temporary:
        with open(temporary, "x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    sync_folder(path.parent)


def publish_exclusively(path: Path, data: bytes) -> bool:
    """Creates `path` with `data`, atomically; durable on return.

    Returns:
        False if the path existed already; it is left as it was.

    Raises:
        LabelingError: The file system has no hard links.
    """
    try:
        _publish(path, data, os.link)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
            raise LabelingError(
                f"the file system of {str(path.parent)!r} has no hard links, which the store's markers need",
                remedy="Choose a folder on another file system for the store.",
            ) from None
        raise
    return True


def _publish(path: Path, data: bytes, give_name: Callable[[Path, Path], None]) -> None:
    """Writes a temporary file and gives it its name with `os.rename` or `os.link`."""
    for last in (False, False, True):
        with _temporary_file(path) as temporary:
            _write(temporary, data)
            try:
                give_name(temporary, path)
                break
            except FileNotFoundError:
                # Another run on this store has just finished and cleaned up the folder: write it again.
                if last:
                    raise
    sync_folder(path.parent)


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` for a new file, which is removed at the end of the block or at Ctrl-C."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    unfinished_files.add(temporary)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        unfinished_files.discard(temporary)


def _write(path: Path, data: bytes) -> None:
    """Writes `data` to a new file, durably."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Makes the names of files in a folder durable (fsync)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sealed(record: dict[str, Any]) -> bytes:
    """Returns a record as JSON that contains its own checksum, since nothing else covers a marker."""
    text = json.dumps(record, ensure_ascii=False, sort_keys=True)
    whole = {**record, "xxh3": xxhash.xxh3_64_hexdigest(text.encode())}
    return json.dumps(whole, ensure_ascii=False, indent=1).encode() + b"\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads a record that `write_sealed` wrote. Raises IntegrityError if the file is damaged."""
    try:
        record = json.loads(path.read_bytes())
        seal = record.pop("xxh3")
        text = json.dumps(record, ensure_ascii=False, sort_keys=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None
    if seal != xxhash.xxh3_64_hexdigest(text.encode()):
        raise damaged(path, "content that does not match its checksum")
    return record


def write_sealed(path: Path, record: dict[str, Any]) -> bool:
    """Writes a record with its checksum. Returns False if the path existed already."""
    return publish_exclusively(path, sealed(record))


def damaged(path: Path, got: str, expected: str | None = None) -> IntegrityError:
    """The error of a stored file that is not as it was written."""
    return IntegrityError(
        f"{str(path)!r} is damaged",
        got=got,
        expected=expected,
        remedy="Run the same labeling command again: it labels this shard again.",
    )
