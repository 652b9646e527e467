"""What tar shards and parquet files have in common: names with braces, duplicate keys, and an index that is kept.

Legend: N images.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from labeler.remote.file_cache import default_folder
from labeler.sources.archive_file import ArchiveFile
from labeler.sources.image_list import leaves_root

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_FILES = 100_000
AGAIN = "Copy or download it again, or leave it out."  # a damaged archive
INDEX_VERSION = 1
SHOW_PROGRESS_FROM = 20  # archives
Index = dict[str, np.ndarray]


def expand_braces(name: str) -> list[str]:
    """Returns the names that `name-{000..146}.tar` stands for; a name without braces stands for itself.

    Raises:
        InputError: The range is empty or too large.
    """
    found = BRACES.search(name)
    if found is None:
        return [name]
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MOST_FILES:
        raise InputError(
            f"{name!r} stands for no files", got=f"{first} to {last}", expected="a range such as {000..146}"
        )
    width = len(found[1])
    names = [f"{name[: found.start()]}{i:0{width}d}{name[found.end() :]}" for i in range(first, last + 1)]
    return [one for some in names for one in expand_braces(some)]


def check_keys(keys: tuple[str, ...], what: str, repeated: str, outside: str) -> None:
    """Checks the keys of an archive.

    Args:
        keys: Sorted keys.
        what: What the archive is, for messages.
        repeated: What to do about two equal keys.
        outside: What to do about a key that leaves the image root.

    Raises:
        InputError: A key is repeated, or is not a path below the image root.
    """
    for before, key in pairwise(("", *keys)):
        if before == key:
            raise InputError(
                f"two images of the {what} have the same name", got=repr(key), expected="each image once",
                remedy=repeated,
            )  # fmt: skip
        if leaves_root(key):
            raise InputError(
                f"an image of the {what} has a name that leaves the image root", got=repr(key),
                expected="a relative path with / between folders", remedy=outside,
            )  # fmt: skip


def with_progress(archives: Sequence[ArchiveFile], progress: bool) -> Iterable[ArchiveFile]:
    """Yields archives with a progress bar, if there are many."""
    if not progress or len(archives) < SHOW_PROGRESS_FROM:
        return archives
    from tqdm import tqdm

    return tqdm(archives, "index")


def pack_names(names: list[str]) -> np.ndarray:
    """Packs names, none of which has a NUL, into one uint8 array."""
    return np.frombuffer("\0".join(names).encode(), np.uint8)


def unpack_names(packed: np.ndarray, count: int) -> list[str]:
    """Unpacks `count` names."""
    return packed.tobytes().decode().split("\0") if count else []


def kept_index(archive: ArchiveFile, kind: str) -> Index | None:
    """Returns the index of an archive that an earlier run kept; None if there is none, or the archive has changed."""
    file = _index_file(archive, kind)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError):
        return None
    except Exception as error:  # zipfile and zlib have errors of their own for a damaged file
        if type(error).__module__ in ("zipfile", "zlib"):
            return None
        raise


def keep_index(archive: ArchiveFile, kind: str, index: Index) -> None:
    """Keeps an index for later runs; does nothing where the cache folder cannot be written."""
    buffer = io.BytesIO()
    np.savez(buffer, **index)  # type: ignore[arg-type]
    try:
        file = _index_file(archive, kind)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, buffer.getvalue())
    except OSError:
        return


def _index_file(archive: ArchiveFile, kind: str) -> Path:
    """Returns where the index of this version of an archive is kept."""
    identity = f"{INDEX_VERSION} {kind} {archive.version}"
    return default_folder() / "index" / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]}.npz"
