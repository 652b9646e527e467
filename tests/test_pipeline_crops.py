"""Which pixels are shown, erased and mixed: windows and boxes against torchvision's, timm's and CutMix's.

Legend: B images; S input side; h×w token grid, T = h·w.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from tiny import picture
from torchvision.transforms import RandomResizedCrop

from labeler.base.errors import InputError
from pipeline.augment.crops import center_crops, random_resized_crops
from pipeline.augment.erasing import draw_erased, erase
from pipeline.augment.mix import MixBox, mix_pixels, sample_mix_box

RATIO = (3 / 4, 4 / 3)


def assert_shapes(shapes: np.ndarray, areas: np.ndarray, share: tuple[float, float], aspect: tuple[float, float]):
    """Height and width [B, 2] give a share of the areas [B] and a first-to-second ratio, both rounded to pixels."""
    a, b = shapes.T
    assert ((a - 0.5) * (b - 0.5) <= share[1] * areas).all()
    assert ((a + 0.5) * (b + 0.5) >= share[0] * areas).all()
    assert ((a - 0.5) / (b + 0.5) <= aspect[1]).all()
    assert ((a + 0.5) / np.maximum(b - 0.5, 1e-9) >= aspect[0]).all()


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.25, 0.5)])
def test_windows_lie_in_the_image_with_the_area_and_shape_asked_for(scale: tuple[float, float]):
    rng = np.random.default_rng(0)
    height = rng.integers(1, 700, 20000)
    sizes = np.stack([height, np.maximum(1, np.rint(height * rng.uniform(0.75, 1.33, 20000)))], 1).astype(np.int64)
    windows = random_resized_crops(sizes, scale, RATIO, rng)
    assert windows.dtype == np.int64
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2:] <= sizes).all()
    shapes = windows[:, 2:] - windows[:, :2]
    assert (shapes > 0).all()
    drawn = sizes.min(1) >= 8  # with fewer pixels all attempts may fail, and the whole image is shown
    assert_shapes(shapes[drawn, ::-1], sizes[drawn].prod(1), scale, RATIO)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (7, 300), (300, 7), (1, 1)])
def test_an_image_that_no_window_fits_shows_its_centre_as_in_torchvision(size: tuple[int, int]):
    scale = (0.9, 1.0)
    found = random_resized_crops(np.array([size] * 3), scale, RATIO, np.random.default_rng(1))
    top, left, height, width = RandomResizedCrop.get_params(torch.zeros(3, *size), list(scale), list(RATIO))
    assert found.tolist() == [[top, left, top + height, left + width]] * 3


@pytest.mark.parametrize("size", [(375, 500), (200, 480), (97, 64)])
def test_windows_are_distributed_as_torchvisions(size: tuple[int, int]):
    n, scale = 4000, (0.08, 1.0)
    image = torch.zeros(3, *size)
    torch.manual_seed(2)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(RATIO)) for _ in range(n)])
    theirs[:, 2:] += theirs[:, :2]
    ours = random_resized_crops(np.array([size] * n), scale, RATIO, np.random.default_rng(2))

    def measures(windows: np.ndarray) -> np.ndarray:
        shapes = windows[:, 2:] - windows[:, :2]
        place = (windows[:, :2] + 0.5) / (np.array(size) - shapes + 1)
        return np.stack([shapes.prod(1) / np.prod(size), np.log(shapes[:, 1] / shapes[:, 0]), *place.T], 1)

    found, expected = measures(ours), measures(theirs)
    # Means within four standard errors of their difference; spreads within 5 %.
    error = 4 * np.sqrt((found.var(0) + expected.var(0)) / n)
    assert (np.abs(found.mean(0) - expected.mean(0)) < error).all()
    np.testing.assert_allclose(found.std(0), expected.std(0), rtol=0.05)


@pytest.mark.parametrize("size", [(40, 52), (113, 71), (60, 60), (33, 200), (201, 34), (19, 23)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(("side", "crop_pct"), [(24, 0.875), (32, 1.0), (27, 0.9), (16, 0.5)])
def test_the_evaluation_window_shows_what_timm_shows(size: tuple[int, int], crop_mode: str, side: int, crop_pct: float):
    image = picture(side + size[0], *size)
    timm = create_transform(
        input_size=side, is_training=False, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1),
        crop_pct=crop_pct, crop_mode=crop_mode,
    )  # fmt: skip
    y0, x0, y1, x1 = center_crops(np.array([size]), side, crop_pct, crop_mode)[0]
    shown = (
        np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))).transpose(2, 0, 1) / 255
    )
    assert np.abs(shown - timm(image).numpy()).mean() < 0.1 / 255


def test_the_rectangles_to_erase_have_the_share_area_and_shape_asked_for():
    n, side = 20000, 64
    boxes = draw_erased(n, side, 0.25, np.random.default_rng(3))
    shapes = boxes[:, 2:] - boxes[:, :2]
    erased = shapes.prod(1) > 0
    assert abs(erased.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    assert (shapes[~erased] == 0).all()
    assert boxes.min() >= 0
    assert boxes.max() == side  # the far edge is reached, and not passed
    timm = RandomErasing()
    area, aspect = (timm.min_area, timm.max_area), np.exp(timm.log_aspect_ratio)
    assert_shapes(shapes[erased], np.full(erased.sum(), side * side), area, aspect)
    # Large flat rectangles that do not fit are drawn anew, so the mean is a little under the middle.
    assert abs(shapes[erased].prod(1).mean() / side**2 - np.mean(area)) < 0.01
    never = draw_erased(500, side, 0.0, np.random.default_rng(3))
    assert (never[:, :2] == never[:, 2:]).all()
    always = draw_erased(500, side, 1.0, np.random.default_rng(3))
    assert (always[:, :2] < always[:, 2:]).all()


@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_erasing_fills_the_rectangles_and_nothing_else(mode: str):
    boxes = np.array([[3, 5, 40, 60], [10, 10, 10, 10], [0, 0, 63, 20], [44, 30, 64, 64]])
    before = torch.full((4, 3, 64, 64), 7.0)
    images = before.clone()
    assert erase(images, boxes, mode, torch.Generator().manual_seed(4)) is images
    inside = torch.zeros(4, 1, 64, 64, dtype=torch.bool)
    for i, (y0, x0, y1, x1) in enumerate(boxes.tolist()):
        inside[i, :, y0:y1, x0:x1] = True
    inside = inside.expand_as(images)
    assert torch.equal(images[~inside], before[~inside])
    filled = images[inside]
    if mode == "const":
        assert (filled == 0).all()
        return
    n = len(filled)
    assert abs(filled.mean()) < 4 / math.sqrt(n)
    assert abs(filled.std() - 1) < 4 / math.sqrt(2 * n)
    assert filled.unique().numel() > 0.99 * n  # each pixel and channel its own
    again, other = (erase(before.clone(), boxes, mode, torch.Generator().manual_seed(s)) for s in (4, 5))
    assert torch.equal(again, images)
    assert not torch.equal(other, images)


@pytest.mark.parametrize("grid", [(14, 14), (5, 9), (1, 3), (1, 1)])
def test_lam_is_the_share_of_tokens_outside_the_box(grid: tuple[int, int]):
    generator = torch.Generator().manual_seed(5)
    h, w = grid
    for _ in range(300):
        box = sample_mix_box(grid, 1.0, generator)
        assert 0 <= box.y0 <= box.y1 <= h
        assert 0 <= box.x0 <= box.x1 <= w
        mask = box.mask(grid)
        assert mask.shape == (h * w,)
        assert box.lam == 1 - int(mask.sum()) / (h * w)
        assert mask.view(grid)[box.y0 : box.y1, box.x0 : box.x1].all()


def test_equal_generators_draw_equal_boxes():
    first, again, other = (
        [sample_mix_box((14, 14), 0.8, generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(s) for s in (6, 6, 7))
    )
    assert first == again
    assert first != other
    torch.manual_seed(8)
    drawn = sample_mix_box((14, 14), 0.8)
    torch.manual_seed(8)
    assert sample_mix_box((14, 14), 0.8) == drawn


@pytest.mark.parametrize(("grid", "alpha"), [((14, 14), 1.0), ((14, 14), 0.3), ((7, 20), 5.0)])
def test_boxes_are_distributed_as_cutmix_draws_them(grid: tuple[int, int], alpha: float):
    """The mean of lam is over 1/2: CutMix cuts its boxes at the edge and rounds them down."""
    n, (h, w) = 6000, grid
    rng = np.random.default_rng(9)
    cut = np.sqrt(1 - rng.beta(alpha, alpha, n))
    half_y, half_x = (h * cut).astype(int) // 2, (w * cut).astype(int) // 2
    y, x = rng.integers(0, h, n), rng.integers(0, w, n)
    rows = np.clip(y + half_y, 0, h) - np.clip(y - half_y, 0, h)
    columns = np.clip(x + half_x, 0, w) - np.clip(x - half_x, 0, w)
    expected = 1 - rows * columns / (h * w)

    generator = torch.Generator().manual_seed(10)
    boxes = [sample_mix_box(grid, alpha, generator) for _ in range(n)]
    lam = np.array([box.lam for box in boxes])
    error = 4 * math.sqrt((lam.var() + expected.var()) / n)
    assert abs(lam.mean() - expected.mean()) < error
    assert abs(lam.std() - expected.std()) < 0.02
    assert lam.mean() > 0.5
    middle = np.array([[(b.y0 + b.y1) / 2 / h, (b.x0 + b.x1) / 2 / w] for b in boxes])
    assert (np.abs(middle.mean(0) - 0.5) < 0.06).all()  # whole tokens lie half a token towards the start


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_a_mixing_strength_that_is_not_positive_is_refused(alpha: float):
    with pytest.raises(InputError, match="mix_alpha must be positive"):
        sample_mix_box((14, 14), alpha)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_box_shows_the_partner_and_the_rest_the_image_itself(batch: int):
    images = torch.randn(batch, 3, 24, 32, generator=torch.Generator().manual_seed(11))
    before = images.clone()
    mix, patch = MixBox(1, 2, 4, 7, 1 - 15 / 48), (4, 4)
    mixed = mix_pixels(images, mix, patch)
    inside = mix.mask((6, 8)).view(6, 8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert inside.sum() == 15 * 16
    for b in range(batch):
        expected = torch.where(inside, before[batch - 1 - b], before[b])
        assert torch.equal(mixed[b], expected)
    assert torch.equal(images, before)
    assert mixed.data_ptr() != images.data_ptr()
    assert torch.equal(mix_pixels(images, MixBox(2, 3, 2, 3, 1.0), patch), before)
