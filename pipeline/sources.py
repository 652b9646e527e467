"""Sources of image files: a folder, a list of keys, or tar shards in WebDataset layout.

Every source has its images sorted by key, knows the size of each file, and can be read from any thread.
"""

from __future__ import annotations

import os
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from labeler.base.errors import InputError, IntegrityError
from labeler.sources.images import SUFFIXES, ImageSet, find_images

LABEL_SUFFIX = ".cls"
SHOW_PROGRESS_FROM = 20  # tar shards
HEAD_BYTES = 1 << 16


class ImageSource(Protocol):
    """A source of image files.

    Attributes:
        images: Keys, sorted, and file sizes.
        labels: int64 [N]: true classes that the source itself has, −1 where it has none; None: it has no classes.
        groups: int64 [N]: the tar shard of each image; None: images can be read in any order.
        folders: Sorted names of the folders that can be classes.
    """

    images: ImageSet
    labels: np.ndarray | None
    groups: np.ndarray | None
    folders: list[str]

    def read(self, position: int) -> bytes:
        """Reads the file of the image at `position`. Raises IntegrityError, which names the file, if that fails."""
        ...

    def head(self, position: int) -> bytes:
        """Reads its first HEAD_BYTES."""
        ...

    def path(self, position: int) -> str:
        """Returns the path of its file, or that of the tar shard followed by the file's name."""
        ...


class FolderSource:
    """Images below a folder, or those that a list names.

    Args:
        root: The image root.
        image_list: File of keys, one per line; None: all images.

    Raises:
        InputError: See `find_images`.
    """

    labels: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __init__(self, root: str | Path, image_list: str | Path | None = None) -> None:
        self.images = find_images(root, image_list)
        self._prefix = os.fsencode(root) + b"/"
        folders = [entry for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
        self.folders = sorted(os.fsencode(entry.name).decode("utf-8", "backslashreplace") for entry in folders)

    def read(self, position: int) -> bytes:
        """Reads the file of the image at `position`. Raises IntegrityError, which names the file, if that fails."""
        key, size = self.images.keys[position], int(self.images.sizes[position])
        data = self._read(key, size + 1)
        if len(data) != size or not size:
            reason = f"changed after the loader started, {size} bytes then" if size else "empty file"
            raise unreadable(self.path(position), reason)
        return data

    def path(self, position: int) -> str:
        """Returns the path of the file."""
        return str(self.images.root / self.images.keys[position])

    def head(self, position: int) -> bytes:
        """Reads the first HEAD_BYTES of the file."""
        return self._read(self.images.keys[position], HEAD_BYTES)

    def _read(self, key: str, most: int) -> bytes:
        try:
            return _read_at(self._prefix + key.encode(), 0, most)
        except OSError as error:
            raise unreadable(str(self.images.root / key), f"cannot be read: {error.strerror}") from None


class TarSource:
    """Images inside uncompressed tar files.

    In WebDataset layout, the files of a sample are next to each other and have the same name up to the first dot of its
    last part: here `NAME.jpg` (any image suffix) and optionally `NAME.cls` with the class id as text. Keys are the
    member names, so a tar file of a labeled folder has the folder's keys.

    Args:
        shards: The tar files.
        root: Their folder.
        progress: Show a progress bar.

    Raises:
        InputError: There are no images, a shard is damaged, or names are repeated or not UTF-8.
    """

    def __init__(self, shards: list[Path], root: Path, progress: bool = True) -> None:
        self.shards = shards
        members: list[tuple[str, int, int, int]] = []  # key, shard, offset, bytes
        classes: dict[tuple[int, str], int] = {}
        other = 0
        for number, path in enumerate(tqdm(shards, "index", disable=not progress or len(shards) < SHOW_PROGRESS_FROM)):
            for name, offset, size in _members(path):
                suffix = os.path.splitext(name)[1].lower()
                if suffix in SUFFIXES:
                    members.append((name, number, offset, size))
                elif suffix == LABEL_SUFFIX:
                    classes[number, _sample(name)] = self._read_class(path, name, offset, size)
                else:
                    other += 1
        if not members:
            raise InputError("no images in the tar shards", got=f"{len(shards)} shards, {other} files of other types")
        members.sort()
        keys = tuple(key for key, *_ in members)
        self.folders = sorted({key.split("/", 1)[0] for key in keys if "/" in key})
        for before, key in pairwise(keys):
            if before == key:
                raise InputError("two images of the tar shards have the same name", got=repr(key))
        self.groups: np.ndarray | None = np.array([shard for _, shard, _, _ in members], np.int64)
        self._shard_of = self.groups
        self._offsets = np.array([offset for _, _, offset, _ in members], np.int64)
        self.images = ImageSet(root, keys, np.array([size for *_, size in members], np.int64), {}, other)
        labels = [classes.get((shard, _sample(key)), -1) for key, shard, _, _ in members]
        self.labels: np.ndarray | None = np.array(labels, np.int64) if classes else None

    @staticmethod
    def _read_class(path: Path, name: str, offset: int, size: int) -> int:
        """Reads a class id."""
        text = _read_at(path, offset, min(size, 32))
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{name!r} in {str(path)!r} is not a class", got=text, expected="a whole number") from None

    def read(self, position: int) -> bytes:
        """Reads the file of the image at `position`. Raises IntegrityError, which names the file, if that fails."""
        return self._read(position, int(self.images.sizes[position]))

    def head(self, position: int) -> bytes:
        """Reads the first HEAD_BYTES of the file."""
        return self._read(position, min(HEAD_BYTES, int(self.images.sizes[position])))

    def path(self, position: int) -> str:
        """Returns the path of the file."""
        return str(self.shards[self._shard_of[position]] / self.images.keys[position])

    def _read(self, position: int, size: int) -> bytes:
        path = self.shards[self._shard_of[position]]
        try:
            data = _read_at(path, int(self._offsets[position]), size)
        except OSError as error:
            raise unreadable(self.path(position), f"cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise unreadable(self.path(position), "its shard ends too early: it changed after the loader started")
        return data


def open_source(images: str | Path, image_list: str | Path | None = None, progress: bool = True) -> ImageSource:
    """Opens a source of images.

    Args:
        images: A .tar file, a folder of .tar files, or a folder of images.
        image_list: File of keys, one per line, for a folder of images; None: all images.
        progress: Show a progress bar.

    Returns:
        The source.

    Raises:
        InputError: The images cannot be used.
    """
    path = Path(images)
    if path.suffix == ".tar":
        shards, root = [path], path.parent
    else:
        shards, root = sorted(path.glob("*.tar")), path
    if not shards:
        return FolderSource(path, image_list)
    if image_list is not None:
        raise InputError("image_list only works with a folder of images", got=f"tar shards in {str(path)!r}")
    return TarSource(shards, root, progress)


def unreadable(path: str, reason: str, remedy: str = "Restore the file, or leave it out.") -> IntegrityError:
    """Returns the error for an image that cannot be used."""
    return IntegrityError(f"the image {path!r} cannot be used", got=reason, remedy=remedy)


def _members(path: Path) -> list[tuple[str, int, int]]:
    """Returns (name, offset, bytes) of the regular files in a tar file."""
    try:
        with tarfile.open(path, "r:") as archive:
            entries = list(archive)
            # The bytes of a hard link are those of the file that it names.
            files = [(m, archive.getmember(m.linkname) if m.islnk() else m) for m in entries if m.isreg() or m.islnk()]
            members = [(m.name.removeprefix("./"), data.offset_data, data.size) for m, data in files]
            for name, _, _ in members:
                name.encode()
        # tarfile accepts any end; a complete archive has an empty block after its last file.
        last = max((offset + size for _, offset, size in members), default=0)
        if os.path.getsize(path) < -(-last // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")
    except UnicodeEncodeError:
        raise InputError(f"a file name in {str(path)!r} is not valid UTF-8", got=ascii(name)) from None
    except (OSError, KeyError, tarfile.TarError) as error:
        raise InputError(
            f"the tar shard {str(path)!r} cannot be read", got=str(error), expected="a complete, uncompressed tar file"
        ) from None
    return members


def _sample(name: str) -> str:
    """Returns the sample of a member: its path up to the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.', 1)[0]}"


def _read_at(path: Path | bytes, offset: int, size: int) -> bytes:
    """Reads up to `size` bytes of a file from `offset` on."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)
