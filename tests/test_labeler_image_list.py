"""Lists of images: what is one, and what is said of a line that is almost one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from tiny import make_images

from labeler import InputError
from labeler.sources.folder_source import find_images

NEAR_MISSES = {
    # lines of a list -> the line that is wrong, what is said of it, and the right line that is shown
    "header": ("path,label\nclass1/img001.jpg,1\n", 1, "'path,label', a header", None),
    "header alone": ("filename\nclass1/img001.jpg\n", 1, "'filename', a header", None),
    "comma": ("class1/img001.jpg,1", 1, "with another column", "class1/img001.jpg"),
    "comma and name": ("class1/img001.jpg, tench", 1, "with another column", "class1/img001.jpg"),
    "semicolon": ("class1/img001.jpg;1", 1, "with another column", "class1/img001.jpg"),
    "tab": ("class0/img000.jpg\nclass1/img001.jpg\t1", 2, "with another column", "class1/img001.jpg"),
    "space": ("class1/img001.jpg 1", 1, "with another column", "class1/img001.jpg"),
    "class first": ("1 class1/img001.jpg", 1, "with another column", "class1/img001.jpg"),
    "quotes": ('"class1/img001.jpg"', 1, "with quotes or spaces", "class1/img001.jpg"),
    "quotes in a csv": ('"class1/img001.jpg","tench"', 1, "with another column", "class1/img001.jpg"),
    "spaces": ("\n  class1/img001.jpg ", 2, "with quotes or spaces", "class1/img001.jpg"),
    "absolute": ("{root}/class1/img001.jpg", 1, "an absolute path", "class1/img001.jpg"),
    "absolute elsewhere": ("/elsewhere/a.jpg", 1, "an absolute path", None),
    "backslashes": ("class1\\img001.jpg\r\n", 1, "with \\ between folders", "class1/img001.jpg"),
    "drive": ("C:\\data\\class1\\img001.jpg", 1, "with \\ between folders", "class1/img001.jpg"),
    "find": ("./class1/img001.jpg", 1, "with another folder in front", "class1/img001.jpg"),
    "root in front": ("images/class1/img001.jpg", 1, "with another folder in front", "class1/img001.jpg"),
    "no suffix": ("class1/img001", 1, "without its suffix", "class1/img001.jpg"),
    "comment": ("# mine\nclass1/img001.jpg", 1, "a comment", None),
    "out of the root": ("../secret.jpg", 1, "leaves the image root", None),
    "not there": ("class1/img007.jpg", 1, "which is no file there", None),
    "nul": ("class1/\0.jpg", 1, "which is no file there", None),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_a_list_that_is_almost_one_is_told_what_a_line_looks_like(tmp_path, case):
    text, number, said, key = NEAR_MISSES[case]
    images, listed = make_images(tmp_path / "images", 6), tmp_path / "list.txt"
    listed.write_bytes(text.replace("{root}", str(images)).encode())
    with pytest.raises(InputError) as refused:
        find_images(images, listed)
    told = str(refused.value)
    assert f"list.txt, line {number}: got " in told
    assert said in told
    shown = re.search(r"such as '(.+?)'\. An image list is UTF-8 text with one such path per line", told)
    assert shown is not None
    assert key in (None, shown[1])
    assert find_images(images, _one_line(tmp_path, shown[1])).keys == (shown[1],)


def _one_line(folder: Path, line: str) -> Path:
    (folder / "right.txt").write_text(line)
    return folder / "right.txt"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lists_from_windows_are_read(tmp_path, mark):
    images, listed = make_images(tmp_path / "images", 6), tmp_path / "list.txt"
    listed.write_bytes(f"{mark}class1/img001.jpg\r\n\r\nclass0/img000.jpg\r\n".encode())
    assert find_images(images, listed).keys == ("class0/img000.jpg", "class1/img001.jpg")


def test_a_list_of_another_encoding_is_told_so(tmp_path):
    images, listed = make_images(tmp_path / "images", 6), tmp_path / "list.txt"
    listed.write_text("class1/img001.jpg\n", "utf-16")
    with pytest.raises(InputError, match="UTF-16 text, expected UTF-8 text with one path"):
        find_images(images, listed)


def test_names_with_commas_and_spaces_are_keys_like_any_other(tmp_path):
    images = make_images(tmp_path / "images", 2)
    names = ("a b, c.jpg", "#1 'x'.jpg")
    for name in names:
        shutil.copy(images / "class0/img000.jpg", images / name)
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert find_images(images, tmp_path / "list.txt").keys == tuple(sorted(names))
