"""Bad images: named and left out, whatever they are, and no memory is spent on them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from faults import tally
from PIL import Image
from tiny import encoded, picture

from labeler import LabelStore

HERE = Path(__file__).parent
BOMB_SIDE = 20_000  # 1.2 GB once decoded to RGB
MOST_MEMORY = 1.4e9  # a run of the labeler takes 0.8 GB, most of it for torch's libraries


def pixel_bomb() -> bytes:
    """A PNG of 20,000 × 20,000 black pixels in 50 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((BOMB_SIDE // 8 + 1) * BOMB_SIDE), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bad_images() -> dict[str, bytes]:
    good = encoded(picture(1))
    return {
        "truncated.jpg": good[: len(good) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not an image at all\n" * 50,
        "animation.jpg": encoded(picture(2).convert("P"), "GIF"),
        "point.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "line.png": encoded(Image.new("RGB", (20_000, 1)), "PNG"),
        "bomb.png": pixel_bomb(),
    }


@pytest.mark.fault(16)
@pytest.mark.fault(17)
def test_bad_images_and_a_pixel_bomb_cost_their_rows_and_no_memory(images, tmp_path):
    bad = bad_images()
    for name, data in bad.items():
        (images / "class1" / name).write_bytes(data)
    store = tmp_path / "labels"
    command = [sys.executable, "-m", "labeler", "label", str(images), "--store", str(store)]
    command += ["--teacher", "tiny:colour_teacher", "--batch-size", "8", "--quiet", "--json"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "errors", "wb") as errors:
        child = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 3, (tmp_path / "errors").read_text()
    assert json.loads((tmp_path / "out").read_text())["rows"] == 12
    labels = LabelStore(store)
    assert {entry["key"] for entry in labels.quarantine} == {f"class1/{name}" for name in bad}
    assert len(labels) == 12
    assert usage.ru_maxrss * 1024 < MOST_MEMORY
    tally(16, injected=len(bad), lost=12 - len(labels))
    tally(17, injected=1)
