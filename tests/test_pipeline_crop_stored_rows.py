"""Rows of a store cropped in one compiled pass, against decoding and cropping with torch's operators."""

import numpy as np
import pytest
import torch

from labeler.store.score_code import ScoreCode
from labeler.store.stored_rows import StoredRows
from pipeline.compiled.available import kernels
from pipeline.geometry import Views, axis_weights, compose, flips, identity
from pipeline.targets import crop_stored_rows as module
from pipeline.targets.crop_stored_rows import crop_stored_rows, decode_and_crop

CLASSES, LEVELS = 50, 20
NAMES = ("token_scores", "token_background", "cls_scores", "cls_background", "tail_offsets", "classes", "tail_classes")
WHOLE = (0.0, 0.0, 1.0, 1.0)


def random_rows(n: int, palette: int, cells: tuple[int, int], seed: int = 0) -> StoredRows:
    random = np.random.default_rng(seed)
    region = random.uniform(0, 0.2, (n, 4)).astype(np.float32)
    region[:, 2:] = 1 - region[:, 2:]
    return StoredRows(
        classes=random.integers(-1, CLASSES, (n, palette)),
        scores=random.integers(0, LEVELS + 1, (n, palette, *cells)).astype(np.uint8),
        background=random.integers(LEVELS + 1, LEVELS + 60, (n, *cells)).astype(np.uint8),
        region=region,
        tail_classes=random.integers(-1, CLASSES, (n, 3)),
        tail_offsets=random.integers(-8, 9, (n, 3)).astype(np.int8),
    ).to_torch()


def random_views(n: int, seed: int = 0) -> Views:
    random = np.random.default_rng(seed)
    corner, side = random.uniform(0, 0.9, (n, 2)), random.uniform(0.02, 1, (n, 2))
    boxes = torch.from_numpy(np.concatenate([corner, np.minimum(corner + side, 1)], 1))
    affine = identity(n)
    affine[:, 0, 2] = torch.from_numpy(random.uniform(-0.3, 0.3, n))  # moved up or down, as RandAugment does
    return Views(boxes, compose(flips(torch.from_numpy(random.random(n) < 0.5)), affine))


def assert_same(found, expected, at=slice(None)):
    for name in NAMES:
        a, b = getattr(found, name)[at], getattr(expected, name)[at]
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def compiled():
    if kernels("crop_kernels") is None:
        pytest.skip("Numba cannot be used")


@pytest.mark.parametrize("as_background", [True, False])
@pytest.mark.parametrize(
    ("palette", "cells", "grid"),
    [(1, (1, 1), (1, 1)), (7, (1, 5), (3, 2)), (8, (9, 9), (14, 14)), (17, (18, 12), (4, 14)), (64, (7, 7), (2, 2))],
)
def test_it_is_decoding_and_cropping(palette, cells, grid, as_background):
    rows, views = random_rows(12, palette, cells), random_views(12)
    views.boxes[0] = torch.tensor(WHOLE)
    code = ScoreCode(ScoreCode.of_roots(LEVELS).values, as_background)
    assert_same(crop_stored_rows(rows, code, CLASSES, views, grid), decode_and_crop(rows, code, CLASSES, views, grid))


def test_rotated_views_take_the_other_way_and_their_neighbors_do_not(monkeypatch):
    rows, views, code = random_rows(9, 5, (8, 8)), random_views(9), ScoreCode.of_roots(LEVELS)
    views.affine[[2, 7], 0, 1] = 0.3
    expected = decode_and_crop(rows, code, CLASSES, views, (4, 4))
    seen = []
    monkeypatch.setattr(
        module, "decode_and_crop", lambda rows, *rest: seen.append(len(rows)) or decode_and_crop(rows, *rest)
    )
    assert_same(crop_stored_rows(rows, code, CLASSES, views, (4, 4)), expected)
    assert seen == [2]
    views.affine[:, 0, 1] = 0.1
    expected = decode_and_crop(rows, code, CLASSES, views, (4, 4))
    assert_same(crop_stored_rows(rows, code, CLASSES, views, (4, 4)), expected)
    assert seen == [2, 9]


def test_any_number_of_threads_gives_the_same_bits():
    rows, views, code = random_rows(11, 9, (6, 6)), random_views(11), ScoreCode.of_roots(LEVELS)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found.append(crop_stored_rows(rows, code, CLASSES, views, (5, 3)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(getattr(found[0], name), getattr(other, name)) for name in NAMES)


@pytest.mark.parametrize("bins", [1, 3, 14])
@pytest.mark.parametrize("cells", [1, 2, 9, 40])
def test_the_weights_of_an_axis_are_those_of_the_geometry(cells, bins):
    random = np.random.default_rng(cells)
    for _ in range(20):
        start, end = np.sort(random.uniform(-0.3, 1.3, 2))
        gain, shift = random.choice([-1.0, 1.0]), random.uniform(-0.5, 1)
        weights, spans = np.empty((bins, cells), np.float32), np.empty((bins, 2), np.int64)
        kernels("crop_kernels").axis_weights(start, end, gain, shift, bins, weights, spans)
        given = (torch.tensor([value], dtype=torch.float64) for value in (start, end, gain, shift))
        expected = axis_weights(*given, cells, bins)[0].numpy()
        assert np.allclose(weights, expected, atol=1e-6)
        for row, (first, last) in zip(expected, spans, strict=True):
            assert not row[:first].any()
            assert not row[last:].any()


def test_without_numba_targets_are_the_same(monkeypatch):
    rows, views, code = random_rows(4, 5, (8, 8)), random_views(4), ScoreCode.of_roots(LEVELS)
    found = crop_stored_rows(rows, code, CLASSES, views, (4, 4))
    monkeypatch.setattr(module, "kernels", lambda name: None)
    assert_same(crop_stored_rows(rows, code, CLASSES, views, (4, 4)), found)


def test_a_store_of_half_precision_scores_takes_the_other_way():
    rows = random_rows(3, 4, (5, 5))
    halves = StoredRows(**{**vars(rows), "scores": rows.scores.half(), "background": None})
    code, views = ScoreCode(None, False), random_views(3)
    expected = decode_and_crop(halves, code, CLASSES, views, (2, 2))
    assert_same(crop_stored_rows(halves, code, CLASSES, views, (2, 2)), expected)
