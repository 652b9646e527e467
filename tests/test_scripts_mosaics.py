"""Pictures put together of real ones, the fault that is measured on them, and teachers with fewer cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from labeler.store.label_store import LabelStore
from labeler.store.score_code import ScoreCode
from pipeline.geometry import Views, identity
from pipeline.targets import row_reader
from scripts.evidence import teachers
from scripts.evidence.mosaics import LARGER, PARTS, SHORTEST, SIDE, cut, draw, draw_all
from scripts.evidence.swapped import swapped_crops
from scripts.evidence.true_maps import FLOOR, true_map, true_store

CLASSES = ("bird", "cat", "dog", "ship", "truck")


@pytest.fixture
def images(tmp_path):
    """Images of one color a class, so that each pixel of a picture tells its class."""
    for split in ("train", "test"):
        for number, name in enumerate(CLASSES):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (32, 32), (50 * number, 0, 0)).save(folder / f"{index}.png")
    return tmp_path / "images"


def test_boxes_tile_the_picture_and_the_first_is_clearly_the_largest():
    generator = np.random.default_rng(0)
    for _ in range(50):
        boxes = cut(generator)
        assert PARTS[0] <= len(boxes) <= PARTS[1]
        covered = np.zeros((SIDE, SIDE), int)
        for y0, x0, y1, x1 in boxes:
            assert min(y1 - y0, x1 - x0) >= SHORTEST
            covered[y0:y1, x0:x1] += 1
        assert (covered == 1).all()
        areas = [(y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in boxes]
        assert areas[0] >= LARGER * max(areas[1:])


def test_the_truth_is_the_class_of_each_pixel_and_the_label_is_that_of_the_largest_object():
    pools = [[np.full((32, 32, 3), 50 * number, np.uint8)] for number in range(5)]
    generator = np.random.default_rng(1)
    for label in range(5):
        picture, truth = draw(pools, label, generator)
        assert (picture[..., 0] == 50 * truth).all()
        counts = np.bincount(truth.ravel(), minlength=5)
        # Two small objects of one class may together be larger than the largest.
        assert counts[label] >= SIDE * SIDE / PARTS[1]


def test_pictures_are_drawn_whole_or_not_at_all_and_the_same_each_time(images, tmp_path):
    first, second = (draw_all(images, tmp_path / name, {"train": 10, "test": 5}) for name in ("a", "b"))
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*.png"))
    assert len(names) == 2 * 15
    assert sum(name.startswith("train/cat/") for name in names) == 2
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert not list(tmp_path.glob("*.tmp"))
    before = (first / names[0]).stat().st_mtime_ns
    draw_all(images, first, {"train": 60, "test": 3})
    assert (first / names[0]).stat().st_mtime_ns == before


def test_swapped_crops_are_those_of_the_transposed_part(monkeypatch):
    seen = []
    monkeypatch.setattr(row_reader, "crop_stored_rows", lambda rows, code, n, views, grid: seen.append(views.boxes))
    views = Views(torch.tensor([[0.1, 0.2, 0.5, 0.9]], dtype=torch.float64), identity(1))
    with swapped_crops():
        row_reader.crop_stored_rows(None, ScoreCode, 3, views, (2, 2))
    row_reader.crop_stored_rows(None, ScoreCode, 3, views, (2, 2))
    assert [boxes.tolist() for boxes in seen] == [[[0.2, 0.1, 0.9, 0.5]], [[0.1, 0.2, 0.5, 0.9]]]


def test_a_teacher_with_fewer_cells_gives_the_mean_of_its_map():
    torch.manual_seed(0)
    full, whole = teachers.averaged(2).eval(), teachers.whole().eval()
    whole.load_state_dict(full.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert full.score_maps(images).shape == (1, 10, 2, 2)
        torch.testing.assert_close(whole.score_maps(images)[..., 0, 0], whole(images))
        torch.testing.assert_close(full.score_maps(images).mean((2, 3)), whole(images))


def test_a_teacher_of_five_classes_has_zero_for_all_others():
    torch.manual_seed(0)
    full, five = teachers.averaged(2).eval(), teachers.top_five().eval()
    five.load_state_dict(full.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = full.score_maps(images), five.score_maps(images)
    kept = found != 0
    assert (kept.sum(1) == 5).all()
    torch.testing.assert_close(found[kept], expected[kept])
    assert (expected.masked_fill(kept, -torch.inf).amax(1) <= expected.masked_fill(~kept, torch.inf).amin(1)).all()


def test_a_true_map_gives_each_class_its_share_of_the_cell():
    classes = np.zeros((8, 8), np.uint8)
    classes[:4, 4:6] = 3  # half of the upper right cell
    classes[4:, :4] = 7
    logits, ids = true_map(classes, 2).float()
    shares = torch.zeros(10, 2, 2).scatter(0, ids.long(), logits).exp()
    shares = shares / shares.sum(0)
    for (y, x), expected in {(0, 0): {0: 1.0}, (0, 1): {0: 0.5, 3: 0.5}, (1, 0): {7: 1.0}, (1, 1): {0: 1.0}}.items():
        for id in range(10):
            share = (expected.get(id, 0.0) + FLOOR) / (1 + 10 * FLOOR)
            assert shares[id, y, x] == pytest.approx(share, abs=2e-3)


def test_true_maps_come_into_a_store_that_says_what_each_picture_shows(images, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.evidence.true_maps.CLASSES", CLASSES)
    drawn = draw_all(images, tmp_path / "mosaics", {"train": 6, "test": 3})
    made = true_store(drawn / "train", drawn / "truth" / "train", tmp_path / "stores" / "true", cells=4)
    assert made["teacher"] is None
    assert 0 < made["agreement"] <= 1
    assert made["bytes"] > 0
    store = LabelStore(tmp_path / "stores" / "true")
    maps = store.read(range(len(store))).dense()
    for key, probabilities in zip(store.keys, maps, strict=True):
        truth = np.asarray(Image.open(drawn / "truth" / "train" / key))
        shares = np.stack([(truth == id).reshape(4, 16, 4, 16).mean((1, 3)) for id in range(5)])
        assert np.abs(probabilities - (shares + FLOOR) / (1 + 5 * FLOOR)).max() < 2e-3
