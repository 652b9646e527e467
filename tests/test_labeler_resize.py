"""Images are resized on a CPU as PIL does it, whatever does it."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import picture

from labeler.sources.decoding.resize import resize


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 401), (61, 40), (224, 224), (9, 700)])
def test_torchs_filters_are_pils(interpolation, size):
    image = picture(0, *size)
    found = resize(np.array(image), 64, interpolation)
    assert found.shape == (64, 64, 3)
    expected = np.asarray(image.resize((64, 64), Image.Resampling[interpolation.upper()])).astype(int)
    off = np.abs(found - expected)
    assert off.mean() < 0.05  # of 255
    assert (off > 1).mean() < 0.01


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="Linux tells of threads")
def test_a_thread_that_resizes_starts_no_other():
    """OpenMP's would wait for the teacher's, and the teacher's for them."""
    torch.set_num_threads(2)
    pixels, counts = np.array(picture(1, 300, 400)), []

    def count() -> None:
        before = len(os.listdir("/proc/self/task"))
        resize(pixels, 224, "bicubic")
        counts.append(len(os.listdir("/proc/self/task")) - before)

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert counts == [0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_a_box_is_seen_through_pils_own_filter(interpolation):
    image, method = picture(2, 90, 120), Image.Resampling[interpolation.upper()]
    found = resize(np.array(image), 32, interpolation, (3.5, 10.25, 80.0, 99.75))
    expected = np.asarray(image.resize((32, 32), method, box=(10.25, 3.5, 99.75, 80.0)))
    assert (found == expected).all()
