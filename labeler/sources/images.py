"""Image files: keys below a root, lists of keys, and checks that need no decoding.

A key is the file's path relative to the image root, with its extension and "/" as separator. Keys are sorted by code
point, so that every machine cuts the same shards.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from labeler.base.errors import InputError, LabelingError, MismatchError
from labeler.sources.image_list import image_path, read_image_list

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".gif"]
)
# The formats that labeler and loaders decode, see `labeler.sources.pixels`.
FORMATS = frozenset({"JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"})

# Read errors that are not the image's fault: too many open files, no memory, a network folder that went away.
OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
OF_THE_MACHINE |= {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}


class BadImage(Exception):
    """One image cannot be labeled; the text is the reason for the quarantine."""


@dataclass(frozen=True)
class ImageSet:
    """The images of a run, sorted by key.

    Attributes:
        root: The image root.
        keys: Unique keys; a printable substitute where the name cannot be a key, which `problems` then says.
        sizes: int64 [N]: file sizes in bytes.
        problems: position -> why the file cannot be opened as an image of this root.
        other: Number of files that do not have the name of an image and were ignored.
    """

    root: Path
    keys: tuple[str, ...]
    sizes: np.ndarray
    problems: dict[int, str] = field(default_factory=dict)
    other: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all keys and file sizes: changes if an image is added, removed, renamed or changes in size."""
        digest = hashlib.sha256()
        for key, size in zip(self.keys, self.sizes.tolist(), strict=True):
            digest.update(f"{len(key.encode())} {size} ".encode() + key.encode())
        return digest.hexdigest()


def image_root(root: str | Path) -> Path:
    """Returns the folder as a path. Raises InputError if it is not a folder."""
    root = Path(root)
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing there"
        raise InputError(f"{str(root)!r} is not a folder of images", got=got, expected="a folder")
    return root


def find_images(root: str | Path, list_file: str | Path | None = None) -> ImageSet:
    """Finds all images below a folder.

    Args:
        root: The image root.
        list_file: Text file of keys, one per line: use only these.

    Returns:
        The images, sorted by key.

    Raises:
        InputError: The root is not a folder, has no images, or a line of the list leaves the root, repeats a key or
            names no file.
    """
    root = image_root(root)
    if list_file is not None:
        return _from_list(root, Path(list_file))
    found_images: list[tuple[str, int, str | None]] = []
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
        found_images.append((key, size, problem))
    if not found_images:
        raise InputError(
            f"no images below {str(root)!r}",
            got=f"{other} files of other types",
            expected="files ending in " + " ".join(sorted(SUFFIXES)),
        )
    return _image_set(root, found_images, other)


def _image_set(root: Path, entries: list[tuple[str, int, str | None]], other: int) -> ImageSet:
    """Makes an ImageSet of (key, bytes, problem) entries."""
    entries.sort()
    return ImageSet(
        root,
        tuple(key for key, _, _ in entries),
        np.array([size for _, size, _ in entries], np.int64),
        {i: problem for i, (_, _, problem) in enumerate(entries) if problem is not None},
        other,
    )


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


def _from_list(root: Path, list_file: Path) -> ImageSet:
    """Returns the images that a list names."""

    def some_key() -> str | None:
        images = (relative for _, relative in _walk(root) if os.path.splitext(relative)[1].lower() in SUFFIXES)
        key = next(images, None)
        return None if key is None else os.fsencode(key.replace(os.sep, "/")).decode("utf-8", "backslashreplace")

    listed = read_image_list(root, list_file, some_key)
    return _image_set(root, [(key, size, None) for key, size in listed], 0)


def read_image(root: Path, key: str, size: int | None = None) -> bytes:
    """Reads the bytes of an image file.

    Args:
        root: The image root.
        key: The image's key.
        size: Expected file size in bytes; None: any.

    Returns:
        The bytes.

    Raises:
        BadImage: The file cannot be read, is empty, or has another size.
        LabelingError: The machine is at fault, and other images would fail as well.
    """
    try:
        data = image_path(root, key).read_bytes()
    except OSError as error:
        if error.errno in OF_THE_MACHINE or not _holds_files(root):
            raise LabelingError(
                f"images below {str(root)!r} can no longer be read on {socket.gethostname()}",
                got=f"{error.strerror or error} at {key!r}",
                remedy="No image was quarantined for it; once the folder is back, the same command resumes.",
            ) from None
        raise BadImage(f"cannot be read: {error.strerror or error}") from None
    if not data:
        raise BadImage("empty file")
    if size is not None and len(data) != size:
        raise BadImage(f"changed after the run began: {len(data)} bytes, listed with {size}")
    return data


def _holds_files(root: Path) -> bool:
    """Whether a folder exists and is not empty; a mount point whose disk went away is empty."""
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def image_digest(data: bytes) -> int:
    """Returns the xxh3-64 of an image file's bytes, to detect images that changed after labeling."""
    return xxhash.xxh3_64_intdigest(data)


def check_header(data: bytes, min_side: int, max_pixels: int) -> None:
    """Checks an image's header, before any decoding.

    Args:
        data: Bytes of the image file.
        min_side: Smallest side in pixels that is allowed.
        max_pixels: Most pixels that are allowed.

    Raises:
        BadImage: It cannot be an image for training.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # The limit below is ours; PIL would warn about its own.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            kind, (width, height) = image.format, image.size
    except UnidentifiedImageError:
        raise BadImage("not an image, or of an unknown format") from None
    except Image.DecompressionBombError:
        raise BadImage("so many pixels that it could be a decompression bomb") from None
    except Exception as error:  # decoders raise errors of any type on broken headers
        raise BadImage(f"broken header: {error}") from None
    if kind not in FORMATS:
        raise BadImage(f"{kind} is not a format that the training loader decodes")
    if min(width, height) < min_side:
        raise BadImage(f"too small: {height}×{width} pixels, the shorter side must have {min_side}")
    if width * height > max_pixels:
        raise BadImage(f"too large: {height}×{width} pixels, more than {max_pixels:,} in all")


def difference(images: ImageSet, keys: tuple[str, ...]) -> str:
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


def refuse_other_images(images: ImageSet, fingerprint: str, keys: tuple[str, ...], store: object) -> None:
    """Raises MismatchError if the images are not those that the store was labeled from."""
    if images.fingerprint != fingerprint:
        raise MismatchError(
            f"the images below {str(images.root)!r} are not those of the store {str(store)!r}",
            got=f"fingerprint {images.fingerprint[:12]}, {difference(images, keys)}",
            expected=f"fingerprint {fingerprint[:12]}",
            remedy="Restore the images, or label these into a new store.",
        )
