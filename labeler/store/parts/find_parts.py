"""The folders and files of a store that may have parts: `part-00001/`, `part-00002/`, … below its own folder.

A part is there when its plan is. It is found by trying the next number, without a listing, which remote stores do not
have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from labeler.base.errors import IntegrityError
from labeler.base.whole_files import TEMPORARY

PLAN_FILE = "plan.json"
EXTENDING = "extending"  # the part that `label --extend` is writing; it gets its number when it is whole


def part_name(number: int) -> str:
    """Returns the name of a part's folder; the first part is the store's own folder, "", and has number 0."""
    return f"part-{number:05d}" if number else ""


def part_folders(store: Path) -> list[Path]:
    """Finds the parts of a store.

    Args:
        store: The store's folder.

    Returns:
        The folders of all parts, the store's own first.

    Raises:
        IntegrityError: A part is a link, which could lead anywhere.
    """
    folders = [store]
    while os.path.lexists((folder := store / part_name(len(folders))) / PLAN_FILE):
        if folder.is_symlink():
            raise IntegrityError(
                f"{str(folder)!r} is refused", got="a link", expected="a folder of this store",
                remedy="`merge` makes one store of several.",
            )  # fmt: skip
        folders.append(folder)
    return folders


def store_files(store: Path) -> Iterator[str]:
    """Yields the name of every file of a store relative to its folder, such as "part-00001/plan.json"."""
    for number, folder in enumerate(part_folders(store)):
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_file() and not e.name.startswith(TEMPORARY))
        yield from (f"{part_name(number)}/{name}" if number else name for name in names)


def store_bytes(store: Path) -> int:
    """Returns the bytes of all files of a store."""
    return sum((store / name).stat().st_size for name in store_files(store))
