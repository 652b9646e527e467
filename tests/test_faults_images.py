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
# Its peak resident memory in kB goes to the file that the first argument names: what a parent is told of its child
# by `wait4` counts the parent's own memory at the fork.
LABEL_AND_TELL_MEMORY = """
import re, sys
from pathlib import Path
from labeler.__main__ import main

status = main(sys.argv[2:])
peak = re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text())[1]
Path(sys.argv[1]).write_text(peak)
sys.exit(status)
"""
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
    command = [sys.executable, "-c", LABEL_AND_TELL_MEMORY, str(tmp_path / "peak"), "label", str(images)]
    command += ["--store", str(store), "--teacher", "tiny:colour_teacher", "--batch-size", "8", "--quiet", "--json"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["rows"] == 12
    labels = LabelStore(store)
    assert {entry["key"] for entry in labels.quarantine} == {f"class1/{name}" for name in bad}
    assert len(labels) == 12
    assert int((tmp_path / "peak").read_text()) * 1024 < MOST_MEMORY
    tally(16, injected=len(bad), lost=12 - len(labels))
    tally(17, injected=1)
