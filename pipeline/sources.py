"""Where image files come from: a folder, a list of keys, or tar shards in WebDataset layout.

Every source has its images sorted by key, knows each file's size, and reads any of them from any thread.
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
    """images   keys, sorted, and file sizes
    labels    true classes that the source itself tells, int64 [N] with −1 where it does not; None: it tells none
    groups    int64 [N]: the tar shard of each image, None where any order is as good as another
    folders   names of the folders that can stand for classes, sorted
    """

    images: ImageSet
    labels: np.ndarray | None
    groups: np.ndarray | None
    folders: list[str]

    def read(self, position: int) -> bytes:
        """The file of the image at `position`. Raises IntegrityError naming it where it cannot be had."""
        ...

    def head(self, position: int) -> bytes:
        """The first HEAD_BYTES of it."""
        ...

    def path(self, position: int) -> str:
        """Of the image's file, or of the tar shard with the file's name behind it."""
        ...


class FolderSource:
    """Images below a folder, or those that a list file names."""

    labels: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __init__(self, root: str | Path, image_list: str | Path | None = None) -> None:
        self.images = find_images(root, image_list)
        self._prefix = os.fsencode(root) + b"/"
        found = [entry for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
        self.folders = sorted(os.fsencode(entry.name).decode("utf-8", "backslashreplace") for entry in found)

    def read(self, position: int) -> bytes:
        key, size = self.images.keys[position], int(self.images.sizes[position])
        data = self._read(key, size + 1)
        if len(data) != size or not size:
            reason = f"changed after the loader began, {size} bytes then" if size else "empty file"
            raise unreadable(self.path(position), reason)
        return data

    def path(self, position: int) -> str:
        return str(self.images.root / self.images.keys[position])

    def head(self, position: int) -> bytes:
        return self._read(self.images.keys[position], HEAD_BYTES)

    def _read(self, key: str, most: int) -> bytes:
        try:
            return _read_at(self._prefix + key.encode(), 0, most)
        except OSError as error:
            raise unreadable(str(self.images.root / key), f"cannot be read: {error.strerror}") from None


class TarSource:
    """Images inside uncompressed tar files.

    WebDataset layout: the files of one sample lie side by side and share their name up to the first dot of its last
    part; here `NAME.jpg` (any image suffix) and, if there is one, `NAME.cls` with the class id as text. Keys are the
    member names, so a tar file of a labeled folder has the folder's keys.
    """

    def __init__(self, shards: list[Path], root: Path, progress: bool = True) -> None:
        self.shards = shards
        found: list[tuple[str, int, int, int]] = []  # key, shard, offset, bytes
        classes: dict[tuple[int, str], int] = {}
        other = 0
        for number, path in enumerate(tqdm(shards, "index", disable=not progress or len(shards) < SHOW_PROGRESS_FROM)):
            for name, offset, size in _members(path):
                suffix = os.path.splitext(name)[1].lower()
                if suffix in SUFFIXES:
                    found.append((name, number, offset, size))
                elif suffix == LABEL_SUFFIX:
                    classes[number, _sample(name)] = self._read_class(path, name, offset, size)
                else:
                    other += 1
        if not found:
            raise InputError("no images in the tar shards", got=f"{len(shards)} shards, {other} files of other kinds")
        found.sort()
        keys = tuple(key for key, *_ in found)
        self.folders = sorted({key.split("/", 1)[0] for key in keys if "/" in key})
        for before, key in pairwise(keys):
            if before == key:
                raise InputError("two images of the tar shards have the same name", got=repr(key))
        self.groups: np.ndarray | None = np.array([shard for _, shard, _, _ in found], np.int64)
        self._shard_of = self.groups
        self._offsets = np.array([offset for _, _, offset, _ in found], np.int64)
        self.images = ImageSet(root, keys, np.array([size for *_, size in found], np.int64), {}, other)
        told = [classes.get((shard, _sample(key)), -1) for key, shard, _, _ in found]
        self.labels: np.ndarray | None = np.array(told, np.int64) if classes else None

    @staticmethod
    def _read_class(path: Path, name: str, offset: int, size: int) -> int:
        text = _read_at(path, offset, min(size, 32))
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{name!r} in {str(path)!r} is not a class", got=text, expected="a whole number") from None

    def read(self, position: int) -> bytes:
        return self._read(position, int(self.images.sizes[position]))

    def head(self, position: int) -> bytes:
        return self._read(position, min(HEAD_BYTES, int(self.images.sizes[position])))

    def path(self, position: int) -> str:
        return str(self.shards[self._shard_of[position]] / self.images.keys[position])

    def _read(self, position: int, size: int) -> bytes:
        path = self.shards[self._shard_of[position]]
        try:
            data = _read_at(path, int(self._offsets[position]), size)
        except OSError as error:
            raise unreadable(self.path(position), f"cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise unreadable(self.path(position), "its shard ends before it: it was changed after the loader began")
        return data


def open_source(images: str | Path, image_list: str | Path | None = None, progress: bool = True) -> ImageSource:
    """Tar shards where `images` is a .tar file or a folder that holds some; otherwise a folder of images."""
    path = Path(images)
    if path.suffix == ".tar":
        shards, root = [path], path.parent
    else:
        shards, root = sorted(path.glob("*.tar")), path
    if not shards:
        return FolderSource(path, image_list)
    if image_list is not None:
        raise InputError("image_list goes with a folder of images", got=f"tar shards in {str(path)!r}")
    return TarSource(shards, root, progress)


def unreadable(path: str, reason: str, remedy: str = "Restore the file, or leave it out.") -> IntegrityError:
    return IntegrityError(f"the image {path!r} cannot be used", got=reason, remedy=remedy)


def _members(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of the regular files in a tar."""
    try:
        with tarfile.open(path, "r:") as archive:
            found = list(archive)
            # A hard link's bytes stand where the file that it names does.
            files = [(m, archive.getmember(m.linkname) if m.islnk() else m) for m in found if m.isreg() or m.islnk()]
            members = [(m.name.removeprefix("./"), data.offset_data, data.size) for m, data in files]
            for name, _, _ in members:
                name.encode()
        # tarfile takes any end for the end; a whole archive has an empty block behind its last file.
        last = max((offset + size for _, offset, size in members), default=0)
        if os.path.getsize(path) < -(-last // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")
    except UnicodeEncodeError:
        raise InputError(f"a file name in {str(path)!r} is not valid UTF-8", got=ascii(name)) from None
    except (OSError, KeyError, tarfile.TarError) as error:
        raise InputError(
            f"the tar shard {str(path)!r} cannot be read", got=str(error), expected="a whole, uncompressed tar file"
        ) from None
    return members


def _sample(name: str) -> str:
    """The sample that a member belongs to: its path up to the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.', 1)[0]}"


def _read_at(path: Path | bytes, offset: int, size: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)
