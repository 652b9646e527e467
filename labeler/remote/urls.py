"""URLs and the names of files below them, as text."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from pathlib import Path
from urllib.parse import unquote

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a text is a URL rather than a path."""
    return isinstance(text, str) and URL.match(text) is not None


def path_or_url(text: str | Path) -> Path | str:
    """Returns a URL as it is and all else as a path: an argparse type."""
    return text if isinstance(text, str) and is_url(text) else Path(text)


def local_path(text: str) -> Path:
    """Returns a path, and refuses a URL: an argparse type for what is written here."""
    if is_url(text):
        raise ArgumentTypeError(f"got {text!r}, expected a folder of this machine (push sends a store to a URL)")
    return Path(text)


def split_url(url: str) -> tuple[str, str]:
    """Returns the folder of a file's URL, and the file's name in it, for `RemoteFolder`."""
    folder = url.partition("?")[0].rpartition("/")[0]
    name = url[len(folder) + 1 :]
    return folder, unquote(name) if url.startswith(("http://", "https://")) and "?" not in name else name


def stays_below(name: str) -> bool:
    """Whether a name is a path of plain parts below a folder."""
    parts = name.split("/")
    return not {"", ".", ".."} & set(parts) and "\\" not in name and name.isprintable()
