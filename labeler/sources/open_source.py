"""`open_source`: the images of a folder, a list, tar shards or parquet files, here or behind a URL."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from glob import glob, has_magic
from pathlib import Path

from labeler.base.errors import InputError
from labeler.remote.remote_files import RemoteFolder
from labeler.remote.urls import is_url, split_url
from labeler.sources.archive_file import ArchiveFile, open_archive
from labeler.sources.archives import expand_braces
from labeler.sources.folder_source import SUFFIXES, find_images, images_of_keys
from labeler.sources.image_list import TABLES, parse_image_list
from labeler.sources.image_source import ImageSource
from labeler.sources.parquet_source import parquet_source
from labeler.sources.remote_source import listed_remote_images, remote_images, remote_images_of_keys
from labeler.sources.tar_source import tar_source

ARCHIVES = {".tar": tar_source, ".parquet": parquet_source}
LISTS = (".txt", *TABLES)
METADATA = "metadata.parquet"  # what Hugging Face's image folders keep beside the images


def open_source(images: str | Path, image_list: str | Path | None = None, progress: bool = True) -> ImageSource:
    """Opens a source of images.

    Args:
        images: A folder of images; a list of them (.txt, .csv, .tsv), whose paths are relative to its folder; a .tar or
            .parquet file, several as "name-{000..146}.tar" or "train-*.parquet", or a folder of them. Each of them may
            be behind a URL, but URLs have no stars.
        image_list: List of the images to use, for a folder of images; None: all images.
        progress: Show a progress bar.

    Returns:
        The images, sorted by key.

    Raises:
        InputError: The images cannot be used.
        RemoteError: The service behind a URL does not answer.
    """
    name = str(images)
    if is_url(name):
        return _open_remote(name, image_list, progress)
    path = Path(images)
    files = _archives(path)
    if files:
        _refuse_missing(files)
        return _open_archives([ArchiveFile(str(file)) for file in files], name, image_list, progress)
    if path.suffix.lower() in LISTS and path.is_file():
        _refuse_second_list(name, image_list)
        return find_images(path.parent, path)
    return find_images(path, image_list)


def open_images(images: str | Path, keys: Sequence[str]) -> ImageSource:
    """Opens the images of these keys; those that are not there are `problems` of the source.

    Args:
        images: As for `open_source`.
        keys: The keys.

    Returns:
        The images, sorted by key.

    Raises:
        InputError: The images cannot be used.
        RemoteError: The service behind a URL does not answer.
    """
    name = str(images)
    if _suffix(name) in LISTS and (is_url(name) or Path(name).is_file()):
        name = split_url(name)[0] if is_url(name) else str(Path(name).parent)
    if not is_url(name):
        return open_source(name).of_keys(keys) if _archives(Path(name)) else images_of_keys(name, keys)
    if _suffix(name) in ARCHIVES or _of_kind(RemoteFolder(name).files()):
        return open_source(name, progress=False).of_keys(keys)
    return remote_images_of_keys(name, keys)


def holds_images(path: str | Path) -> bool:
    """Whether a path names many images, as for `open_source`, rather than one. A URL is not looked at."""
    suffix = _suffix(str(path))
    if is_url(str(path)):
        return suffix not in SUFFIXES
    return suffix in ARCHIVES or suffix in LISTS or Path(path).is_dir()


def exists(images: str | Path) -> bool:
    """Whether there is something at a path, quickly: a folder, a list, or archives. A URL is not looked at."""
    name = str(images)
    if is_url(name) or Path(name).is_dir():
        return True
    if _suffix(name) in ARCHIVES:
        return all(file.is_file() for file in _archives(Path(name)))
    return _suffix(name) in LISTS and Path(name).is_file()


def _open_remote(url: str, image_list: str | Path | None, progress: bool) -> ImageSource:
    """Opens the images behind a URL."""
    if _suffix(url) in ARCHIVES:
        return _open_archives([open_archive(one) for one in expand_braces(url)], url, image_list, progress)
    if _suffix(url) in LISTS:
        _refuse_second_list(url, image_list)
        folder, name = split_url(url)
        return listed_remote_images(folder, parse_image_list(RemoteFolder(folder).read(name), url, _suffix(url)))
    if image_list is not None:
        listed = parse_image_list(Path(image_list).read_bytes(), str(image_list), Path(image_list).suffix.lower())
        return listed_remote_images(url, listed)
    remote = RemoteFolder(url)
    files = remote.files()
    archives = _of_kind(files)
    if archives:
        return _open_archives([open_archive(remote.url_of(name)) for name in archives], url, image_list, progress)
    return remote_images(url, remote.files(below=True))


def _open_archives(files: list[ArchiveFile], name: str, image_list: str | Path | None, progress: bool) -> ImageSource:
    if image_list is not None:
        raise InputError("image_list only works with a folder of images", got=f"archives in {name!r}")
    return ARCHIVES[_suffix(files[0].where)](files, name, progress)


def _refuse_missing(files: list[Path]) -> None:
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise InputError(
            f"{missing[0]!r} is not there", got=f"{len(files) - len(missing)} of {len(files)} files",
            remedy="Check the name; numbers in braces, as in {000..146}, stand for all from the first to the last.",
        )  # fmt: skip


def _refuse_second_list(name: str, image_list: str | Path | None) -> None:
    if image_list is not None:
        raise InputError("there are two lists of images", got=f"{name!r} and {str(image_list)!r}", expected="one")


def _suffix(name: str) -> str:
    return os.path.splitext(name.partition("?")[0] if is_url(name) else name)[1].lower()


def _archives(path: Path) -> list[Path]:
    """Returns the archives that a path stands for: itself, those of its braces or stars, or those in the folder."""
    if _suffix(str(path)) in ARCHIVES and not path.is_dir():
        if path.exists() or not has_magic(name := str(path)):
            return [Path(one) for one in expand_braces(str(path))]
        found = [Path(one) for pattern in expand_braces(name) for one in sorted(glob(pattern))]
        if not found:
            raise InputError(f"{name!r} stands for no files", expected="the name of a file that is there, with *")
        return found
    return [path / name for name in _of_kind(entry.name for entry in path.iterdir())] if path.is_dir() else []


def _of_kind(names: Iterable[str]) -> list[str]:
    """Returns the sorted names of archives; empty without any. Raises InputError if they are of two kinds."""
    found = sorted(name for name in names if _suffix(name) in ARCHIVES and name != METADATA)
    kinds = sorted({_suffix(name) for name in found})
    if len(kinds) > 1:
        first = [next(name for name in found if _suffix(name) == kind) for kind in kinds]
        raise InputError(
            "the folder of images has both tar shards and parquet files", got=" and ".join(map(repr, first)),
            expected="files of one kind", remedy='Name those to use, as in "name-{000..146}.tar".',
        )  # fmt: skip
    return found
