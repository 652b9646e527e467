"""`ImageSource`: images sorted by key, wherever they are kept.

A key is the path of an image relative to its root, with its extension and "/" as separator. Keys are sorted by code
point, so that every machine cuts the same shards, and every container of the same images has the same keys.

Legend: N images.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import xxhash

from labeler.base.errors import LabelingError

HEAD_BYTES = 1 << 16
UNKNOWN_SIZE = -1

# Read errors that are not the image's fault: too many open files, no memory, a network folder that went away.
OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
OF_THE_MACHINE |= {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}


class BadImage(Exception):
    """One image cannot be used; the text is the reason, as the quarantine keeps it."""


class Storage(Protocol):
    """Where the bytes of images are. It can be pickled, and read from any thread."""

    def read(self, position: int, most: int | None = None) -> bytes:
        """Reads the file of the image at `position`; at most its first `most` bytes.

        Raises:
            BadImage: The file cannot be read.
            OSError: The same; `errno` tells whether the machine is at fault.
            LabelingError: The machine or the network is at fault.
        """
        ...

    def path(self, position: int) -> str:
        """Returns where the image is, for messages: a path or a URL."""
        ...

    def part(self, positions: np.ndarray) -> Storage:
        """Returns the storage of some of the images, for this or another process on any machine."""
        ...

    def holds_files(self) -> bool:
        """Whether the place of the images is still there."""
        ...


class ImageSource:
    """The images of a run, sorted by key.

    Args:
        name: What the user called them, for messages.
        keys: Unique keys, sorted; a printable substitute where a name cannot be a key, which `problems` then says.
        sizes: int64 [N]: file sizes in bytes; −1 where they are not known before an image is read.
        storage: Where their bytes are.
        problems: position -> why the file cannot be used.
        other: Number of files that do not have the name of an image and were ignored.
        labels: int64 [N]: true classes that the source itself has, −1 where it has none; None: it has no classes.
        class_names: Names of these classes; empty if they only have numbers.
        groups: int64 [N]: the shard of each image, if reading shard by shard is faster; None: any order is fine.
        folders: Names of the folders that can be classes, sorted; None: those of the keys.
    """

    def __init__(
        self,
        name: str,
        keys: tuple[str, ...],
        sizes: np.ndarray,
        storage: Storage,
        problems: Mapping[int, str] | None = None,
        other: int = 0,
        labels: np.ndarray | None = None,
        class_names: tuple[str, ...] = (),
        groups: np.ndarray | None = None,
        folders: list[str] | None = None,
    ) -> None:
        self.name, self.keys, self.sizes, self.storage = name, keys, sizes, storage
        self.problems = dict(problems or {})
        self.other, self.labels, self.class_names, self.groups = other, labels, class_names, groups
        self._folders = folders

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all keys and file sizes: changes if an image is added, removed, renamed or changes in size."""
        return _fingerprint(self.keys, self.sizes)

    @cached_property
    def folders(self) -> list[str]:
        """Names of the folders that can be classes, sorted."""
        if self._folders is not None:
            return self._folders
        return sorted({key.split("/", 1)[0] for key in self.keys if "/" in key})

    @property
    def measured(self) -> bool:
        """Whether all file sizes are known."""
        return bool((self.sizes != UNKNOWN_SIZE).all())

    @property
    def folder(self) -> str | None:
        """The local folder below which every key is the path of a file; None for archives and URLs."""
        return getattr(self.storage, "root", None)

    def position(self, key: str) -> int | None:
        """Returns the position of a key; None if there is no such image."""
        found = bisect_left(self.keys, key)
        return found if found < len(self.keys) and self.keys[found] == key else None

    def read(self, position: int) -> bytes:
        """Reads an image file.

        Args:
            position: The image's position.

        Returns:
            The bytes of the file.

        Raises:
            BadImage: The file cannot be read, is empty, or has another size than when the images were listed.
            LabelingError: The machine is at fault, and other images would fail as well.
        """
        data = self._read(position, None)
        size = int(self.sizes[position])
        if not data:
            raise BadImage("empty file")
        if size not in (len(data), UNKNOWN_SIZE):
            raise BadImage(f"changed after the run began: {len(data)} bytes, listed with {size}")
        return data

    def head(self, position: int) -> bytes:
        """Reads the first 64 kB of an image file; raises the same errors as `read`."""
        return self._read(position, HEAD_BYTES)

    def path(self, position: int) -> str:
        """Returns where an image is, for messages."""
        return self.storage.path(position)

    def part(self, positions: Sequence[int]) -> ImageSource:
        """Returns the images at these positions, in this order, without labels; they can be read on any machine."""
        where = np.asarray(positions, np.int64)
        reasons = ((i, self.problems.get(position)) for i, position in enumerate(where.tolist()))
        return ImageSource(
            self.name,
            chosen(self.keys, where),
            self.sizes[where],
            self.storage.part(where),
            {i: reason for i, reason in reasons if reason is not None},
        )

    def of_keys(self, keys: Sequence[str]) -> ImageSource:
        """Returns the images of these keys, sorted; one that is not there is a problem."""
        wanted = tuple(sorted(keys))
        found = [self.position(key) for key in wanted]
        part = self.part([position or 0 for position in found])
        missing = {i: "there is no such image" for i, position in enumerate(found) if position is None}
        return ImageSource(self.name, wanted, part.sizes, part.storage, part.problems | missing)

    def _read(self, position: int, most: int | None) -> bytes:
        if position in self.problems:
            raise BadImage(self.problems[position])
        try:
            return self.storage.read(position, most)
        except OSError as error:
            if error.errno in OF_THE_MACHINE or not self.storage.holds_files():
                raise LabelingError(
                    f"the images of {self.name!r} can no longer be read on {socket.gethostname()}",
                    got=f"{error.strerror or error} at {self.keys[position]!r}",
                    remedy="No image was quarantined for it; once they are back, the same command resumes.",
                ) from None
            raise BadImage(f"cannot be read: {error.strerror or error}") from None


def chosen(keys: tuple[str, ...], positions: np.ndarray) -> tuple[str, ...]:
    """Returns the keys at some positions."""
    return tuple(keys[i] for i in positions.tolist())


def read_at(path: str | bytes | os.PathLike, offset: int, size: int) -> bytes:
    """Reads up to `size` bytes of a local file from `offset` on."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)


def image_digest(data: bytes) -> int:
    """Returns the xxh3-64 of an image file's bytes, to detect images that changed after labeling."""
    return xxhash.xxh3_64_intdigest(data)


def difference(images: ImageSource, keys: tuple[str, ...]) -> str:
    """Describes in a few words how images differ from stored keys; `keys` is empty if these are not known."""
    if not keys:
        return f"{len(images)} images"
    now, then = set(images.keys), set(keys)
    parts = []
    for word, some in (("new", now - then), ("missing", then - now)):
        if some:
            parts.append(
                f"{len(some)} {word} ({', '.join(map(repr, sorted(some)[:3]))}{' …' if len(some) > 3 else ''})"
            )
    return "; ".join(parts) or "the same names, other file sizes"


def are_labeled_images(images: ImageSource, fingerprint: str, keys: tuple[str, ...]) -> bool:
    """Whether images are those of a store.

    Args:
        images: The images.
        fingerprint: Fingerprint of the images that were labeled.
        keys: Keys of the store, quarantined ones included; empty if they are not known.

    Returns:
        True if the fingerprints are equal, or if one of the two sources has no file sizes and the keys are equal.
    """
    if images.fingerprint == fingerprint:
        return True
    if not images.measured:
        return images.keys == tuple(sorted(keys))
    return _fingerprint(images.keys, np.full(len(images), UNKNOWN_SIZE)) == fingerprint


def _fingerprint(keys: tuple[str, ...], sizes: np.ndarray) -> str:
    """Returns the sha256 over keys and file sizes."""
    digest = hashlib.sha256()
    for key, size in zip(keys, sizes.tolist(), strict=True):
        digest.update(f"{len(key.encode())} {size} ".encode() + key.encode())
    return digest.hexdigest()
