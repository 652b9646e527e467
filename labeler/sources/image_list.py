"""Lists of images: a text file of keys, one a line, and what to say of a line that is almost one."""

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
MOST_TRIES = 200  # of what a line may have meant
MOST_SHOWN = 200  # characters of a line
LONGEST_PATH = 4096


def image_path(root: Path, key: str) -> Path:
    return root / os.fsdecode(key.encode())


def read_image_list(root: Path, list_file: Path, some_key: Callable[[], str | None]) -> list[tuple[str, int]]:
    """(key, bytes of the file) of each line, in the file's order; empty lines count as nothing.

    some_key  an image below the root, for an error to show

    Raises InputError for a line that leaves the root, repeats a key, names no file, or is more than a key.
    """
    real_root = os.path.realpath(root)
    found: list[tuple[str, int]] = []
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
            meant, reason = _meant(root, key, number == header)
            example = meant or some_key() or "folder/image.jpg"
            raise InputError(
                where,
                got=f"{key[:MOST_SHOWN]!r}, {reason}",
                expected=f"nothing but the path of a file below {str(root)!r}, as {example!r}",
                remedy="An image list is UTF-8 text with one such path a line, with / and without a header.",
            )
        found.append((key, size))
    if not found:
        raise InputError(f"the image list {str(list_file)!r} names no image")
    return found


def _lines(list_file: Path) -> list[str]:
    """Without line ends, of Windows too, and without the mark that its editors put in front."""
    try:
        data = list_file.read_bytes()
    except OSError as error:
        raise InputError(f"the image list {str(list_file)!r} cannot be read", got=str(error)) from None
    try:
        # Not splitlines, which also splits at characters that a file name may hold.
        return [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise InputError(
            f"the image list {str(list_file)!r} cannot be read",
            got="UTF-16 text" if wide else str(error),
            expected="UTF-8 text with one path below the image root a line",
        ) from None


def _size(root: Path, real_root: str, key: str, where: str) -> int | None:
    """Bytes of the file that a key names; None where it names none."""
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
    """Whether a line can be a key: relative, below the root, spelled in the one way that the labeler spells it."""
    odd = "\0" in key or "\\" in key or key.startswith("/")
    return not odd and str(PurePosixPath(key)) == key and ".." not in key.split("/")


def _meant(root: Path, line: str, first: bool) -> tuple[str | None, str]:
    """(the key that a line seems to mean, what is wrong with the line). `first`: it may be a header."""
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
    """What a line has that its key has not."""
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
    """What a line may mean: whole or one of its columns, without quotes, from some folder on, with a suffix."""
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
