"""Lists of images: text files of keys, one per line, with helpful errors for lines that are almost a key."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from labeler.base.errors import InputError

COLUMNS = re.compile(r"[,;\t]|\s+")
LEFT_OUT_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPEG", ".JPG", ".webp")
HEADERS = frozenset(["path", "paths", "filepath", "file", "files", "filename", "file_name", "image", "images", "key"])
MOST_TRIES = 200  # guesses at the meaning of a line
MOST_SHOWN = 200  # characters of a line
LONGEST_PATH = 4096


def image_path(root: Path, key: str) -> Path:
    """Returns the path of an image file."""
    return root / os.fsdecode(key.encode())


def read_image_list(root: Path, list_file: Path, some_key: Callable[[], str | None]) -> list[tuple[str, int]]:
    """Reads a list of images, one key per line; empty lines are skipped.

    Args:
        root: The image root.
        list_file: The list.
        some_key: Returns the key of an image below the root, as an example in errors.

    Returns:
        (key, file size in bytes) of each line, in order.

    Raises:
        InputError: A line leaves the root, repeats a key, names no file, or has more than a key.
    """
    real_root = os.path.realpath(root)
    entries: list[tuple[str, int]] = []
    seen: dict[str, int] = {}
    lines = _lines(list_file)
    header = next((number for number, line in enumerate(lines, 1) if line.strip()), 0)
    for number, key in enumerate(lines, 1):
        if not key.strip():
            continue
        where = f"{list_file}, line {number}"
        if key.casefold() in seen:
            raise InputError(where, got=f"{key!r} again (see line {seen[key.casefold()]})", expected="each image once")
        seen[key.casefold()] = number
        size = _size(root, real_root, key, where)
        if size is None:
            guess, reason = _guess(root, key, number == header)
            example = guess or some_key() or "folder/image.jpg"
            raise InputError(
                where,
                got=f"{key[:MOST_SHOWN]!r}, {reason}",
                expected=f"nothing but the path of a file below {str(root)!r}, such as {example!r}",
                remedy="An image list is UTF-8 text with one such path per line, with / and without a header.",
            )
        entries.append((key, size))
    if not entries:
        raise InputError(f"the image list {str(list_file)!r} names no image")
    return entries


def _lines(list_file: Path) -> list[str]:
    """Reads the lines of a file, without line ends (of Windows too) and without a byte order mark."""
    try:
        data = list_file.read_bytes()
    except OSError as error:
        raise InputError(f"the image list {str(list_file)!r} cannot be read", got=str(error)) from None
    try:
        # Not splitlines, which also splits at characters that a file name may contain.
        return [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise InputError(
            f"the image list {str(list_file)!r} cannot be read",
            got="UTF-16 text" if wide else str(error),
            expected="UTF-8 text with one path below the image root per line",
        ) from None


def _size(root: Path, real_root: str, key: str, where: str) -> int | None:
    """Returns the size of a key's file; None if there is no such file."""
    if not _is_plain(key):
        return None
    path = image_path(root, key)
    try:
        if not path.is_file():
            return None
        if not Path(os.path.realpath(path)).is_relative_to(real_root):
            raise InputError(where, got=f"{key!r}, a link that leaves the image root", expected="a file below it")
        return path.stat().st_size
    except OSError as error:
        raise InputError(where, got=f"{key!r}: {error.strerror}", expected=f"a file below {str(root)!r}") from None


def _is_plain(key: str) -> bool:
    """Whether a line can be a key: relative, below the root, in the spelling that the labeler uses."""
    odd = "\0" in key or "\\" in key or key.startswith("/")
    return not odd and str(PurePosixPath(key)) == key and ".." not in key.split("/")


def _guess(root: Path, line: str, first: bool) -> tuple[str | None, str]:
    """Returns (the key that a line probably means, what is wrong with the line). `first`: it may be a header."""
    for key in islice(_guesses(line), MOST_TRIES):
        if _is_plain(key) and _is_file(image_path(root, key)):
            return key, _difference(line, key)
    columns = [column.strip("\"' ") for column in re.split("[,;\t]", line.strip())]
    if columns[0].startswith("#"):
        return None, "a comment"
    named = any("." in column or "/" in column for column in columns)
    if first and not named and (len(columns) > 1 or columns[0].lower() in HEADERS):
        return None, "a header"
    if ".." in re.split(r"[/\\]", line):
        return None, "which leaves the image root"
    return None, "an absolute path" if _is_absolute(line) else "which is no file there"


def _difference(line: str, key: str) -> str:
    """Describes how a line differs from its key."""
    plain = line.replace("\\", "/")
    before, _, after = plain.partition(key) if key in plain else ("", "", "")
    in_front = before.strip("\"' ")
    if after.strip("\"' ") or (in_front and re.search(r"[,;\s][\"']?$", before)):
        return "with another column"
    if "\\" in line:
        return "with \\ between folders"
    if _is_absolute(line):
        return "an absolute path"
    if key not in line:
        return "without its suffix"
    return "with another folder in front" if in_front else "with quotes or spaces around it"


def _is_absolute(line: str) -> bool:
    return re.match(r"\s*[\"']?([A-Za-z]:)?[/\\]", line) is not None


def _guesses(line: str) -> Iterator[str]:
    """Yields keys that a line may mean: all of it or a column, without quotes or leading folders, with a suffix."""
    texts = dict.fromkeys([line, *COLUMNS.split(line)]) if len(line) <= LONGEST_PATH else {}
    plain = [text.strip().strip("\"'").replace("\\", "/") for text in texts if text.strip()]
    for text in plain:
        parts = text.split("/")
        yield from ("/".join(parts[start:]) for start in range(len(parts)))
    for text in plain:
        yield from (text + suffix for suffix in LEFT_OUT_SUFFIXES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
