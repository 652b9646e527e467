"""Boxes, affine maps and the label crop: fast code against matrix products, plain loops and its readable twin.

Legend: B images; C classes; P palette size; H×W map grid; h×w token grid, T = h·w.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labeler.base.errors import InputError
from labeler.store.score_maps import ScoreMaps
from pipeline.augment import policy
from pipeline.geometry import (
    Views,
    apply_affine,
    axis_weights,
    box_in_region,
    compose,
    flips,
    identity,
    is_axis_aligned,
)
from pipeline.targets.crop_reference import crop_one_by_one
from pipeline.targets.crop_score_maps import crop_score_maps
from pipeline.targets.token_targets import TokenTargets, label_targets

CLASSES = 9
FULL = (0.0, 0.0, 1.0, 1.0)
SHAPES = [((18, 18), (14, 14)), ((6, 13), (9, 4)), ((15, 4), (2, 7))]


def random_maps(rng: np.random.Generator, n: int, cells: tuple[int, int], region: object = FULL) -> ScoreMaps:
    classes = torch.from_numpy(np.stack([rng.permutation(CLASSES)[:4] for _ in range(n)]))
    scores, background = (torch.from_numpy(rng.normal(0, 3, (n, *k, *cells))).float() for k in ((4,), ()))
    covered = torch.as_tensor(region, dtype=torch.float32).expand(n, 4)
    return ScoreMaps(classes, scores, background, covered, CLASSES)


def random_boxes(rng: np.random.Generator, n: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """float64 [n, 4]: of all sizes from a hundredth on, within low..high."""
    extent = rng.uniform(0.01, high - low, (n, 2))
    start = low + rng.random((n, 2)) * (high - low - extent)
    return torch.from_numpy(np.concatenate([start, start + extent], 1))


def random_affine(rng: np.random.Generator, n: int, layers: int = 3) -> torch.Tensor:
    """Rotations, shears and shifts as RandAugment draws them, a few in a row."""
    kernels = rng.choice(policy.GEOMETRIC, (n, layers))
    amounts = np.where(kernels == policy.ROTATE, rng.uniform(-30, 30, (n, layers)), rng.uniform(-0.4, 0.4, (n, layers)))
    return torch.from_numpy(policy.compose_geometric(kernels, amounts))


def take(maps: ScoreMaps, index: list[int]) -> ScoreMaps:
    parts = (maps.classes[index], maps.scores[index], maps.background[index], maps.region[index])
    return ScoreMaps(*parts, maps.num_classes)


def assert_same(found: TokenTargets, expected: TokenTargets, atol: float) -> None:
    torch.testing.assert_close(found.tensors(), expected.tensors(), rtol=0, atol=atol)
    assert (found.grid, found.num_classes) == (expected.grid, expected.num_classes)


def square(affine: torch.Tensor) -> torch.Tensor:
    return torch.cat([affine, torch.tensor([[[0.0, 0, 1]]], dtype=affine.dtype).expand(len(affine), -1, -1)], 1)


def test_a_box_is_measured_in_fractions_of_its_region():
    region = torch.tensor([[0.2, 0.1, 0.6, 0.9]], dtype=torch.float64).repeat(3, 1)
    boxes = torch.tensor([[0.2, 0.1, 0.6, 0.9], [0.3, 0.5, 0.4, 0.9], [0.0, 0.1, 1.0, 0.3]], dtype=torch.float64)
    expected = torch.tensor([[0, 0, 1, 1], [0.25, 0.5, 0.5, 1], [-0.5, 0, 2, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(box_in_region(boxes, region), expected)


def test_affine_maps_compose_and_apply_as_matrices_do():
    rng = np.random.default_rng(1)
    outer, inner = (torch.from_numpy(rng.normal(size=(5, 2, 3))) for _ in range(2))
    places = torch.from_numpy(rng.normal(size=(5, 7, 2)))
    torch.testing.assert_close(square(compose(outer, inner)), square(outer) @ square(inner))
    homogeneous = torch.cat([places, torch.ones(5, 7, 1, dtype=torch.float64)], 2)
    torch.testing.assert_close(apply_affine(outer, places), homogeneous @ outer.mT)
    torch.testing.assert_close(
        apply_affine(compose(outer, inner), places), apply_affine(outer, apply_affine(inner, places))
    )


@pytest.mark.parametrize("slant", [-1.0, 0.3, 1.0])
def test_flips_and_scales_are_along_the_axes_and_slants_are_not(slant: float):
    maps = identity(4)
    maps[0, 1, 1], maps[0, 0, 2] = -1.0, slant
    maps[1, 0, 1] = maps[2, 1, 0] = slant
    maps[3, 0, 1], maps[3, 1, 0] = slant, -slant
    assert is_axis_aligned(maps).tolist() == [True, False, False, False]


def test_a_flip_mirrors_columns_and_leaves_rows():
    places = torch.tensor([[[0.1, 0.2]], [[0.1, 0.2]]], dtype=torch.float64)
    flipped = apply_affine(flips(torch.tensor([True, False])), places)
    torch.testing.assert_close(flipped, torch.tensor([[[0.1, 0.8]], [[0.1, 0.2]]], dtype=torch.float64))
    torch.testing.assert_close(compose(flips(torch.tensor([True])), flips(torch.tensor([True]))), identity(1))


def test_places_of_an_input_are_found_in_the_image():
    views = Views(torch.tensor([[0.2, 0.5, 0.6, 0.9]], dtype=torch.float64), flips(torch.tensor([True])))
    places = torch.tensor([[[0.0, 0.0], [0.5, 0.25]]], dtype=torch.float64)
    torch.testing.assert_close(views.to_image(places), torch.tensor([[[0.2, 0.9], [0.4, 0.8]]], dtype=torch.float64))


def test_weights_of_each_token_are_shares_of_one():
    rng = np.random.default_rng(2)
    n = 200
    # Crops inside and outside the map, mirrored and shifted.
    start = torch.from_numpy(rng.uniform(-0.5, 1, n))
    end = start + torch.from_numpy(rng.uniform(0.001, 1.5, n))
    gain, shift = torch.from_numpy(rng.choice([-1.0, 1.0], n)), torch.from_numpy(rng.uniform(-0.5, 1.5, n))
    for cells, bins in ((18, 14), (5, 9), (40, 1)):
        weights = axis_weights(start, end, gain, shift, cells, bins)
        assert weights.shape == (n, bins, cells)
        assert weights.min() >= 0
        torch.testing.assert_close(weights.sum(2), torch.ones(n, bins, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("region", [FULL, (0.125, 0.25, 0.875, 0.5)])
def test_the_whole_map_on_an_equal_grid_is_the_map(region: tuple[float, ...]):
    maps = random_maps(np.random.default_rng(3), 3, (7, 11), region)
    found = crop_score_maps(maps, maps.region, (7, 11))
    torch.testing.assert_close(found.token_scores, maps.scores.flatten(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.token_background, maps.background.flatten(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.cls_scores, maps.scores.mean((2, 3)), rtol=0, atol=1e-5)
    assert found.classes is maps.classes


@pytest.mark.parametrize(("cells", "grid"), SHAPES)
def test_the_targets_of_a_flip_are_the_flipped_targets(cells: tuple[int, int], grid: tuple[int, int]):
    rng = np.random.default_rng(4)
    maps, boxes = random_maps(rng, 12, cells), random_boxes(rng, 12)
    hflip = torch.from_numpy(rng.random(12) < 0.5)
    plain, flipped = crop_score_maps(maps, boxes, grid), crop_score_maps(maps, boxes, grid, hflip)
    tokens = plain.token_scores.view(12, -1, *grid)
    tokens = torch.where(hflip[:, None, None, None], tokens.flip(-1), tokens).flatten(2)
    torch.testing.assert_close(flipped.token_scores, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(flipped.cls_scores, plain.cls_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("cells", "grid"), SHAPES)
def test_a_flip_under_an_affine_map_shows_the_mirrored_image(cells: tuple[int, int], grid: tuple[int, int]):
    rng = np.random.default_rng(5)
    maps, boxes, affine = random_maps(rng, 12, cells), random_boxes(rng, 12), random_affine(rng, 12)
    mirrored = ScoreMaps(maps.classes, maps.scores.flip(-1), maps.background.flip(-1), maps.region, CLASSES)
    y0, x0, y1, x1 = boxes.unbind(1)
    expected = crop_score_maps(mirrored, torch.stack([y0, 1 - x1, y1, 1 - x0], 1), grid, affine=affine)
    found = crop_score_maps(maps, boxes, grid, torch.ones(12, dtype=torch.bool), affine)
    assert_same(found, expected, 1e-5)


def test_the_affine_identity_changes_nothing():
    rng = np.random.default_rng(6)
    maps, boxes = random_maps(rng, 5, (9, 12)), random_boxes(rng, 5)
    found = crop_score_maps(maps, boxes, (4, 6), torch.zeros(5, dtype=torch.bool), identity(5))
    assert_same(found, crop_score_maps(maps, boxes, (4, 6)), 0)


@pytest.mark.parametrize(("cells", "grid"), SHAPES)
def test_a_tiny_shear_changes_hardly_anything(cells: tuple[int, int], grid: tuple[int, int]):
    """It takes the path for slanted views, which must meet the path along the axes."""
    rng = np.random.default_rng(7)
    maps, boxes = random_maps(rng, 24, cells, (0.1, 0.0, 0.9, 0.8)), random_boxes(rng, 24)
    shifted = identity(24)
    shifted[:, :, 2] = torch.from_numpy(rng.uniform(-0.4, 0.4, (24, 2)))
    straight = compose(flips(torch.from_numpy(rng.random(24) < 0.5)), shifted)
    slanted = straight.clone()
    slanted[:, 0, 1] += 1e-9
    along, across = (crop_score_maps(maps, boxes, grid, affine=affine) for affine in (straight, slanted))
    assert_same(across, along, 1e-5)


@pytest.mark.parametrize(("cells", "grid"), SHAPES)
def test_targets_are_those_of_the_readable_twin(cells: tuple[int, int], grid: tuple[int, int]):
    rng = np.random.default_rng(8)
    maps = random_maps(rng, 12, cells, random_boxes(rng, 12, 0.05, 0.95))
    boxes = random_boxes(rng, 12)
    affine = random_affine(rng, 12)
    affine[::3] = identity(4)  # a batch of both kinds
    hflip = torch.from_numpy(rng.random(12) < 0.5)
    found = crop_score_maps(maps, boxes, grid, hflip, affine)
    views = Views(boxes, compose(flips(hflip), affine))
    assert_same(found, crop_one_by_one(maps, views, grid), 1e-5)


def test_parts_outside_the_region_take_the_nearest_cell():
    maps = random_maps(np.random.default_rng(9), 1, (8, 6), (0.25, 0.25, 0.75, 0.75))
    corner = crop_score_maps(maps, torch.tensor([[0.0, 0.8, 0.2, 1.0]]), (3, 3))
    expected = maps.scores[:, :, 0, 5][..., None].expand(-1, -1, 9)  # first row, last column
    torch.testing.assert_close(corner.token_scores, expected, rtol=0, atol=1e-5)
    # Left of the map, rows 2 to 5: their first cells, whatever the column.
    left = crop_score_maps(maps, torch.tensor([[0.375, 0.0, 0.625, 0.25]]), (4, 2)).token_scores.view(1, 4, 4, 2)
    expected = maps.scores[:, :, 2:6, :1].expand(-1, -1, -1, 2)
    torch.testing.assert_close(left, expected, rtol=0, atol=1e-5)


def test_unused_palette_places_get_no_probability():
    rng = np.random.default_rng(10)
    maps, boxes = random_maps(rng, 4, (5, 8)), random_boxes(rng, 4)
    maps.classes[1:, 2] = -1
    maps.scores[1:, 2] = 80.0  # would take everything
    targets = crop_score_maps(maps, boxes, (4, 4))
    without = [0, 1, 3]
    kept = ScoreMaps(maps.classes[:, without], maps.scores[:, without], maps.background, maps.region, CLASSES)
    expected = crop_score_maps(kept, boxes, (4, 4))
    for dense, other in (
        (targets.dense_tokens(CLASSES), expected.dense_tokens(CLASSES)),
        (targets.dense_cls(CLASSES), expected.dense_cls(CLASSES)),
    ):
        torch.testing.assert_close(dense[1:], other[1:], rtol=0, atol=1e-6)
        torch.testing.assert_close(dense.sum(-1), torch.ones(dense.shape[:-1]), rtol=0, atol=1e-6)


def test_a_tokens_distribution_is_the_softmax_over_palette_and_background_copies():
    rng = np.random.default_rng(11)
    classes = np.array([[3, 0, 7], [5, -1, 2]])
    scores, background = rng.normal(0, 4, (2, 3, 6)).astype(np.float32), rng.normal(0, 4, (2, 6)).astype(np.float32)
    expected = np.zeros((2, 6, CLASSES))
    for b in range(2):
        for t in range(6):
            weights = np.full(CLASSES, np.exp(np.float64(background[b, t])))
            for place, c in enumerate(classes[b]):
                if c >= 0:
                    weights[c] = np.exp(np.float64(scores[b, place, t]))
            expected[b, t] = weights / weights.sum()
    parts = [torch.from_numpy(a) for a in (classes, scores, background)]
    targets = TokenTargets(*parts, parts[1][..., 0], parts[2][:, 0])
    np.testing.assert_allclose(targets.dense_tokens(CLASSES), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(targets.dense_cls(CLASSES), expected[:, 0], rtol=0, atol=1e-6)


def test_label_targets_are_one_hot_everywhere():
    targets = label_targets(torch.tensor([2, 0]), 3)
    one_hot = torch.eye(CLASSES)[[2, 0]]
    assert torch.equal(targets.dense_tokens(CLASSES), one_hot[:, None].expand(-1, 3, -1))
    assert torch.equal(targets.dense_cls(CLASSES), one_hot)


def test_an_images_targets_do_not_depend_on_its_batch():
    """Crops of very different sizes share one batch, where each needs another number of samples."""
    rng = np.random.default_rng(12)
    maps, boxes, affine = random_maps(rng, 8, (18, 10)), random_boxes(rng, 8), random_affine(rng, 8)
    affine[::2] = identity(4)
    hflip = torch.from_numpy(rng.random(8) < 0.5)
    together = crop_score_maps(maps, boxes, (5, 3), hflip, affine)
    for i in range(8):
        alone = crop_score_maps(take(maps, [i]), boxes[[i]], (5, 3), hflip[[i]], affine[[i]])
        assert_same(alone, together.each(lambda part: part[[i]]), 1e-6)  # noqa: B023


@pytest.mark.parametrize("shape", [(2, 4), (3, 2), (4,), (3, 1, 4)])
def test_boxes_that_do_not_fit_the_maps_are_refused(shape: tuple[int, ...]):
    maps = random_maps(np.random.default_rng(13), 3, (4, 4))
    with pytest.raises(InputError, match=r"boxes do not fit.*\(3, 4\)"):
        crop_score_maps(maps, torch.zeros(shape), (2, 2))
