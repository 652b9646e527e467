"""Lists of images: text with one key per line, or a table, with helpful errors for lines that are almost a key."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from labeler.base.errors import InputError

COLUMNS = re.compile(r"[,;\t]|\s+")
LEFT_OUT_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPEG", ".JPG", ".webp")
HEADERS = frozenset(["path", "paths", "filepath", "file", "files", "filename", "file_name", "image", "images", "key"])
LABELS = frozenset(["label", "labels", "class", "class_name", "target"])
TABLES = {".csv": ",", ".tsv": "\t"}
TEXT_LIST = (
    "An image list is UTF-8 text with one such path per line, with / and without a header; a table with a column "
    "`path` ends in .csv or .tsv."
)
TABLE_LIST = "A table of images is UTF-8 text with a header: a column `path`, with /, and optionally a column `label`."
MOST_TRIES = 200  # guesses at the meaning of a line
MOST_SHOWN = 200  # characters of a line
LONGEST_PATH = 4096
Row = tuple[int, str, str | None]  # line, path, label


def image_path(root: Path, key: str) -> Path:
    """Returns the path of an image file."""
    return root / os.fsdecode(key.encode())


@dataclass(frozen=True)
class ListedImages:
    """The images that a list names, in its order.

    Attributes:
        keys: Keys of the images.
        sizes: File sizes in bytes; empty if the files were not looked at.
        labels: Text of the column `label`, "" where a line has none; None: the list has no such column.
    """

    keys: list[str]
    sizes: list[int]
    labels: list[str] | None = None


def read_image_list(root: Path, list_file: Path, some_key: Callable[[], str | None]) -> ListedImages:
    """Reads a list of images: text with one key per line, or a table; empty lines are skipped.

    Args:
        root: The image root.
        list_file: The list. A table ends in .csv or .tsv, and has a header with a column `path` and optionally `label`.
        some_key: Returns the key of an image below the root, as an example in errors.

    Returns:
        The images, in order.

    Raises:
        InputError: A line leaves the root, repeats a key, names no file, or has more than a key; or a table has no
            column `path`.
    """
    real_root, sizes = os.path.realpath(root), []
    try:
        data = list_file.read_bytes()
    except OSError as error:
        raise InputError(f"the image list {str(list_file)!r} cannot be read", got=str(error)) from None
    suffix = list_file.suffix.lower()
    rows = _rows(data, str(list_file), suffix)
    for place, (number, key, _) in enumerate(rows):
        where = f"{list_file}, line {number}"
        size = _size(root, real_root, key, where)
        if size is None:
            guess, reason = _guess(root, key, place == 0)
            example = guess or some_key() or "folder/image.jpg"
            raise InputError(
                where,
                got=f"{key[:MOST_SHOWN]!r}, {reason}",
                expected=f"nothing but the path of a file below {str(root)!r}, such as {example!r}",
                remedy=TABLE_LIST if suffix in TABLES else TEXT_LIST,
            )
        sizes.append(size)
    return _listed(rows, sizes)


def parse_image_list(data: bytes, name: str, suffix: str) -> ListedImages:
    """Reads a list whose images are not on this machine.

    Args:
        data: The bytes of the list.
        name: What messages call it.
        suffix: .txt, or .csv or .tsv for a table.

    Returns:
        The images, in order, without their sizes.

    Raises:
        InputError: As for `read_image_list`, except that nothing is looked up.
    """
    rows = _rows(data, name, suffix)
    for number, key, _ in rows:
        if not _is_plain(key):
            raise InputError(
                f"{name}, line {number}", got=repr(key[:MOST_SHOWN]),
                expected="the path of a file below the folder of the images",
                remedy=TABLE_LIST if suffix in TABLES else TEXT_LIST,
            )  # fmt: skip
    return _listed(rows, [])


def _listed(rows: list[Row], sizes: list[int]) -> ListedImages:
    labels = [(label or "").strip() for *_, label in rows]
    has_labels = any(label is not None for *_, label in rows)
    return ListedImages([key for _, key, _ in rows], sizes, labels if has_labels else None)


def _rows(data: bytes, name: str, suffix: str) -> list[Row]:
    """Returns (line, path, label or None) of each image that a list names, each once. Raises InputError."""
    lines = _lines(data, name)
    rows: list[Row] = [(number, line, None) for number, line in enumerate(lines, 1)]
    if suffix in TABLES:
        rows = _table(name, lines, TABLES[suffix])
    rows = [row for row in rows if row[1].strip()]
    seen: dict[str, int] = {}
    for number, key, _ in rows:
        first = seen.setdefault(key.casefold(), number)
        if first != number:
            raise InputError(
                f"{name}, line {number}", got=f"{key!r} again (see line {first})", expected="each image once"
            )
    if not rows:
        raise InputError(f"the image list {name!r} names no image", expected="the path of an image in each line")
    return rows


def _table(name: str, lines: list[str], delimiter: str) -> list[Row]:
    """Returns (line, path, label or None) of each row of a table. Raises InputError without a column `path`."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        path = next((i for i, name in enumerate(columns) if name in HEADERS), None)
        label = next((i for i, name in enumerate(columns) if name in LABELS), None)
        if path is None:
            raise InputError(
                f"the image list {name!r} has no column of paths",
                got=f"the columns {', '.join(columns)[:MOST_SHOWN]}" if columns else "an empty file",
                expected="path, and optionally label",
                remedy=TABLE_LIST,
            )
        return [
            (reader.line_num, row[path] if path < len(row) else "", _column(row, label)) for row in reader if any(row)
        ]
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}", got=str(error), expected="a table") from None


def _column(row: list[str], column: int | None) -> str | None:
    """Returns a column of a row; "" if the row is shorter; None without such a column."""
    return None if column is None else row[column] if column < len(row) else ""


def _lines(data: bytes, name: str) -> list[str]:
    """Splits a list into lines, without line ends (of Windows too) and without a byte order mark."""
    try:
        # Not splitlines, which also splits at characters that a file name may contain.
        return [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise InputError(
            f"the image list {name!r} cannot be read",
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
    return not leaves_root(key) and str(PurePosixPath(key)) == key


def leaves_root(key: str) -> bool:
    """Whether a key is no relative path, with / between folders, that stays below the image root."""
    return key.startswith("/") or ".." in key.split("/") or "\\" in key or "\0" in key


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
