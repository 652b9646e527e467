"""Images below a folder: all of them, those that a list names, or those of given keys."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labeler.base.errors import InputError
from labeler.sources.class_names import number_labels
from labeler.sources.image_list import ListedImages, image_path, read_image_list
from labeler.sources.image_source import ImageSource, Storage, chosen, read_at

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".gif"]
)
CONTAINERS = "Images are a folder, a list (.txt, .csv or .tsv), .tar or .parquet files, or a URL of any of these."
Entry = tuple[str, int, str | None]  # key, bytes, problem


@dataclass(frozen=True)
class FolderStorage:
    """Files below a folder.

    Attributes:
        root: The folder.
        keys: Keys of the images.
        sizes: int64 [N]: their sizes in bytes, so that a file that grows is not read to its end.
    """

    root: str
    keys: tuple[str, ...]
    sizes: np.ndarray

    def read(self, position: int, most: int | None = None) -> bytes:
        """Reads the file of the image at `position`; at most its first `most` bytes."""
        path = os.fsencode(self.root) + b"/" + self.keys[position].encode()
        return read_at(path, 0, int(self.sizes[position]) + 1 if most is None else most)

    def path(self, position: int) -> str:
        """Returns the path of an image."""
        return str(Path(self.root) / self.keys[position])

    def part(self, positions: np.ndarray) -> Storage:
        """Returns the storage of some of the images."""
        return FolderStorage(os.path.abspath(self.root), chosen(self.keys, positions), self.sizes[positions])

    def holds_files(self) -> bool:
        """Whether the folder exists and is not empty; a mount point whose disk went away is empty."""
        try:
            with os.scandir(self.root) as entries:
                return next(entries, None) is not None
        except OSError:
            return False


def image_root(root: str | Path) -> Path:
    """Returns the folder as a path. Raises InputError if it is not a folder."""
    root = Path(root)
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing there"
        raise InputError(f"{str(root)!r} is not a folder of images", got=got, expected="a folder", remedy=CONTAINERS)
    return root


def find_images(root: str | Path, list_file: str | Path | None = None) -> ImageSource:
    """Finds all images below a folder.

    Args:
        root: The image root.
        list_file: List of the images to use, as text or as a table, see `read_image_list`.

    Returns:
        The images, sorted by key.

    Raises:
        InputError: The root is not a folder, has no images, or a line of the list leaves the root, repeats a key or
            names no file.
    """
    root = image_root(root)
    if list_file is not None:
        return _from_list(root, Path(list_file))
    entries: list[Entry] = []
    other = 0
    for entry, relative in _walk(root):
        if os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
            other += 1
            continue
        # By way of bytes: with an old locale Python itself would not read UTF-8 names.
        name, problem = os.fsencode(relative.replace(os.sep, "/")), None
        key = name.decode("utf-8", "backslashreplace")
        if key.encode() != name:
            problem = "the file name is not valid UTF-8"
        size = 0
        if problem is None:
            size, problem = _measure(root, entry)
        entries.append((key, size, problem))
    if not entries:
        raise InputError(
            f"no images below {str(root)!r}",
            got=f"{other} files of other types",
            expected="files ending in " + " ".join(sorted(SUFFIXES)),
        )
    return _source(root, entries, other)


def images_of_keys(root: str | Path, keys: Sequence[str]) -> ImageSource:
    """Returns the images of these keys, without listing the folder; a file that is not there is a problem."""
    root = image_root(root)
    entries: list[Entry] = []
    for key in sorted(keys):
        try:
            entries.append((key, os.stat(image_path(root, key)).st_size, None))
        except OSError as error:
            entries.append((key, 0, f"cannot be read: {error.strerror}"))
    return _source(root, entries, 0)


def _source(root: Path, entries: list[Entry], other: int, listed: ListedImages | None = None) -> ImageSource:
    """Makes the source of these files."""
    entries.sort()
    keys = tuple(key for key, _, _ in entries)
    sizes = np.array([size for _, size, _ in entries], np.int64)
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    if listed is not None and listed.labels is not None:
        of_key = dict(zip(listed.keys, listed.labels, strict=True))
        labels, class_names = number_labels([of_key[key] for key in keys])
    return ImageSource(
        str(root),
        keys,
        sizes,
        FolderStorage(str(root), keys, sizes),
        {i: problem for i, (_, _, problem) in enumerate(entries) if problem is not None},
        other,
        labels,
        class_names,
        folders=_class_folders(root),
    )


def _class_folders(root: Path) -> list[str]:
    """Returns the names of the folders in the root: also those without a listed image can be classes."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(os.fsencode(name).decode("utf-8", "backslashreplace") for name in names)


def _walk(root: Path) -> Iterator[tuple[os.DirEntry, str]]:
    """Yields every file below root with its relative path; links to folders are yielded, not followed."""
    pending = [("", str(root))]
    while pending:
        prefix, folder = pending.pop()
        try:
            entries = os.scandir(folder)
        except OSError as error:
            raise InputError(f"the folder {folder!r} cannot be listed", got=error.strerror) from None
        with entries:
            for entry in entries:
                relative = f"{prefix}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    pending.append((relative + os.sep, entry.path))
                else:
                    yield entry, relative


def _measure(root: Path, entry: os.DirEntry) -> tuple[int, str | None]:
    """Returns the file size, and why the entry cannot be used or None."""
    try:
        if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(os.path.realpath(root)):
            return 0, "a link that leaves the image root"
        status = entry.stat()
    except OSError as error:
        return 0, "a broken link" if entry.is_symlink() else f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return 0, "not a regular file"
    return status.st_size, None


def _from_list(root: Path, list_file: Path) -> ImageSource:
    """Returns the images that a list names."""

    def some_key() -> str | None:
        images = (relative for _, relative in _walk(root) if os.path.splitext(relative)[1].lower() in SUFFIXES)
        key = next(images, None)
        return None if key is None else os.fsencode(key.replace(os.sep, "/")).decode("utf-8", "backslashreplace")

    listed = read_image_list(root, list_file, some_key)
    return _source(root, [(key, size, None) for key, size in zip(listed.keys, listed.sizes, strict=True)], 0, listed)
