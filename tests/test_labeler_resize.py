"""Images are resized on a CPU as PIL does it, whatever does it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny import picture

from labeler.resize import resize


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 401), (61, 40), (224, 224), (9, 700)])
def test_torchs_filters_are_pils(interpolation, size):
    image = picture(0, *size)
    found = resize(np.array(image), 64, interpolation)
    assert found.shape == (1, 3, 64, 64)
    expected = np.asarray(image.resize((64, 64), Image.Resampling[interpolation.upper()])).astype(int)
    off = np.abs(found[0].permute(1, 2, 0).numpy() - expected)
    assert off.mean() < 0.05  # of 255
    assert (off > 1).mean() < 0.01


def test_a_window_of_an_array_is_resized_as_if_it_were_all():
    image = picture(1, 90, 120)
    window = resize(np.array(image)[10:70, 20:110], 32, "bicubic")
    alone = resize(np.asarray(image.crop((20, 10, 110, 70))), 32, "bicubic")
    assert (window == alone).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_a_box_is_seen_through_pils_own_filter(interpolation):
    image, method = picture(2, 90, 120), Image.Resampling[interpolation.upper()]
    found = resize(np.array(image), 32, interpolation, (3.5, 10.25, 80.0, 99.75))
    expected = np.asarray(image.resize((32, 32), method, box=(10.25, 3.5, 99.75, 80.0)))
    assert (found[0].permute(1, 2, 0).numpy() == expected).all()
