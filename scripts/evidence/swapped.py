"""The fault of published code, to measure it: label maps are cropped with swapped axes.

Where the image shows its part (top, left, bottom, right), the labels are those of the part (left, top, right, bottom).

    python -m scripts.evidence.swapped fit RECIPE …        # as `python -m train`, with this fault
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import train.__main__
from pipeline.geometry import Views
from pipeline.targets import row_reader
from pipeline.targets.token_targets import TokenTargets


@contextmanager
def swapped_crops() -> Iterator[None]:
    """While it is open, loaders of this process crop label rows so. Flips stay right."""
    right = row_reader.crop_stored_rows

    def swapped(rows: Any, code: Any, num_classes: int, views: Views, grid: tuple[int, int]) -> TokenTargets:
        return right(rows, code, num_classes, replace(views, boxes=views.boxes[:, [1, 0, 3, 2]]), grid)

    with mock.patch.object(row_reader, "crop_stored_rows", swapped):
        yield


if __name__ == "__main__":
    with swapped_crops():
        raise SystemExit(train.__main__.main())
