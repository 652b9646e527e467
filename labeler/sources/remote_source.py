"""Loose images below a URL: all of them, or those that a list names.

Each is read from the service whenever it is needed. Tar shards and parquet files are kept in the cache, and are the
better way to train from far away.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labeler.base.errors import InputError, LabelingError, RemoteError
from labeler.remote.failures import NotThere
from labeler.remote.file_systems import FileIdentity
from labeler.remote.remote_files import RemoteFolder
from labeler.sources.class_names import number_labels
from labeler.sources.folder_source import SUFFIXES
from labeler.sources.image_list import ListedImages
from labeler.sources.image_source import UNKNOWN_SIZE, BadImage, ImageSource, Storage, chosen


@dataclass(frozen=True)
class RemoteStorage:
    """Files below a URL.

    Attributes:
        remote: The folder.
        keys: Keys of the images.
        identities: The version of each file that was listed; None where only its name is known.
    """

    remote: RemoteFolder
    keys: tuple[str, ...]
    identities: tuple[FileIdentity | None, ...]

    def read(self, position: int, most: int | None = None) -> bytes:
        """Reads the image at `position`; at most its first `most` bytes."""
        key, identity = self.keys[position], self.identities[position]
        size = None if identity is None else identity.size
        wanted = size if most is None or size is None else min(most, size)
        try:
            return self.remote.read(key, 0, wanted, identity)
        except NotThere:
            raise BadImage("there is no such file behind the URL") from None
        except RemoteError as error:
            raise LabelingError(
                error.problem, got=error.got, expected=error.expected,
                remedy="No image was quarantined for it; once the service answers, the same command resumes.",
            ) from None  # fmt: skip

    def path(self, position: int) -> str:
        """Returns the URL of an image."""
        return self.remote.url_of(self.keys[position])

    def part(self, positions: np.ndarray) -> Storage:
        """Returns the storage of some of the images."""
        return RemoteStorage(
            self.remote, chosen(self.keys, positions), tuple(self.identities[i] for i in positions.tolist())
        )

    def holds_files(self) -> bool:
        """Whether the folder is still there; what a service says of it is told by its own errors."""
        return True


def remote_images(url: str, files: dict[str, FileIdentity]) -> ImageSource:
    """Returns the images among the files below a URL.

    Args:
        url: The folder.
        files: Name -> version of all files, from `RemoteFolder.files`.

    Raises:
        InputError: There are none.
    """
    keys = sorted(name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES)
    if not keys:
        raise InputError(
            f"no images below {url}", got=f"{len(files)} files of other types",
            expected="files ending in " + " ".join(sorted(SUFFIXES)),
            remedy=None if files else "Give a list, tar shards or parquet files if the service cannot list a folder.",
        )  # fmt: skip
    # Web servers list names alone; the version of such a file is not known before it is read.
    identities = [files[key] if files[key].size is not None else None for key in keys]
    return _source(url, keys, identities, len(files) - len(keys))


def listed_remote_images(url: str, listed: ListedImages) -> ImageSource:
    """Returns the images below a URL that a list names; whether they are there is seen when they are read."""
    source = _source(url, sorted(listed.keys), [None] * len(listed.keys), 0)
    if listed.labels is not None:
        of_key = dict(zip(listed.keys, listed.labels, strict=True))
        source.labels, source.class_names = number_labels([of_key[key] for key in source.keys])
    return source


def remote_images_of_keys(url: str, keys: Sequence[str]) -> ImageSource:
    """Returns the images of these keys below a URL."""
    return _source(url, sorted(keys), [None] * len(keys), 0)


def _source(url: str, keys: list[str], identities: Sequence[FileIdentity | None], other: int) -> ImageSource:
    sizes = [UNKNOWN_SIZE if one is None or one.size is None else one.size for one in identities]
    storage = RemoteStorage(RemoteFolder(url), tuple(keys), tuple(identities))
    return ImageSource(url, tuple(keys), np.array(sizes, np.int64), storage, other=other)
