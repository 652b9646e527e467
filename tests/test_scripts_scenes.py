"""The demo's scenes and their teacher: same seed same bytes, the truth fits the pictures, the teacher can be loaded."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from labeler import TeacherConfig
from labeler.base.errors import InputError
from labeler.teacher.create_teacher import create_teacher
from scripts.demo.scenes import (
    BACKGROUND,
    CLASSES,
    LARGEST,
    SIDES,
    TEXTURES,
    Scene,
    SceneSet,
    cell_truth,
    generate_scenes,
    map_accuracy,
    render_scene,
)
from scripts.demo.teacher import load_split, random_crops, train_teacher

TRAIN, TEST = 100, 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    return generate_scenes(tmp_path_factory.mktemp("scenes") / "set", TRAIN, TEST, seed=5, progress=False, workers=1)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(np.random.default_rng((11, index))) for index in range(120)]


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_whatever_the_processes(made: SceneSet, tmp_path: Path) -> None:
    generate_scenes(tmp_path / "again", TRAIN, TEST, seed=5, progress=False, workers=2)
    assert content(tmp_path / "again") == content(made.root)


def test_a_scene_depends_on_seed_split_and_number_alone(made: SceneSet, tmp_path: Path) -> None:
    fewer = content(generate_scenes(tmp_path / "fewer", 10, 10, seed=5, progress=False).root)
    other = content(generate_scenes(tmp_path / "other", 10, 10, seed=6, progress=False).root)
    pictures = [name for name in fewer if name.endswith((".jpg", ".png"))]
    whole = content(made.root)
    assert len(pictures) == 40
    assert all(fewer[name] == whole[name] for name in pictures)
    assert all(fewer[name] != other[name] for name in pictures)
    assert all(fewer[name] != fewer[name.replace("train", "test")] for name in pictures if "train" in name)


def test_the_folders_are_an_image_set_with_its_truth_outside(made: SceneSet) -> None:
    assert list(CLASSES) == sorted(CLASSES) == (made.root / "classes.txt").read_text().split()
    for split, count in (("train", TRAIN), ("test", TEST)):
        pictures = sorted((made.root / split).rglob("*.*"))
        assert len(pictures) == count
        assert sorted(path.name for path in (made.root / split).iterdir()) == list(CLASSES)
        for path in pictures:
            key = path.relative_to(made.root / split).as_posix()
            truth = made.truth(split, key)
            with Image.open(path) as image:
                assert (image.format, image.mode, image.size[::-1]) == ("JPEG", "RGB", truth.shape)
            assert truth.dtype == np.uint8
            assert CLASSES[np.bincount(truth[truth != BACKGROUND]).argmax()] == path.parent.name
        assert len(list((made.root / "truth" / split).rglob("*.png"))) == count


def test_every_scene_keeps_the_rules(scenes: list[Scene]) -> None:
    for scene in scenes:
        height, width = scene.truth.shape
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == scene.truth.dtype == np.uint8
        assert height != width
        assert SIDES[0] <= min(height, width) < max(height, width) <= SIDES[1]
        classes, pixels = np.unique(scene.truth[scene.truth != BACKGROUND], return_counts=True)
        assert 2 <= len(classes) <= 3
        assert classes[pixels.argmax()] == scene.label
        sizes = np.sqrt(np.sort(pixels)[::-1])
        assert sizes[0] / sizes[1:] == pytest.approx(LARGEST, rel=0.04)
        assert 0.15 < (scene.truth != BACKGROUND).mean() < 0.5
        touched = np.stack([scene.truth[0], scene.truth[-1]]), np.stack([scene.truth[:, 0], scene.truth[:, -1]])
        assert all((edge == BACKGROUND).all() for edge in touched)


def test_all_classes_occur_as_the_largest_object_and_beside_it(scenes: list[Scene]) -> None:
    assert {scene.label for scene in scenes} == set(range(10))
    beside = {int(c) for s in scenes for c in np.unique(s.truth) if c not in (BACKGROUND, s.label)}
    assert beside == set(range(10))
    assert {len(np.unique(scene.truth)) for scene in scenes} == {3, 4}


def test_the_truth_lies_where_the_textures_are(scenes: list[Scene]) -> None:
    """Textures change from pixel to pixel far more than the background does, but only under the true outline."""
    closest = 0
    for scene in scenes:
        grey = scene.image.astype(np.float64).mean(-1)
        busy = np.hypot(*np.gradient(grey))
        inside = scene.truth != BACKGROUND

        def contrast(mask: np.ndarray, busy: np.ndarray = busy) -> float:
            return busy[mask].mean() - busy[~mask].mean()

        moved = [np.roll(inside, shift, axis) for axis in (0, 1) for shift in (-4, 4)]
        closest += contrast(inside) > max(contrast(mask) for mask in (*moved, inside[::-1], inside[:, ::-1]))
    assert closest >= 0.97 * len(scenes)


@pytest.mark.parametrize("name", CLASSES)
def test_a_texture_fills_its_range_and_is_no_other(name: str) -> None:
    y, x = np.mgrid[:60, :60].astype(np.float32) / 10
    pattern = TEXTURES[name](x, y, 0.1)
    assert pattern.shape == (60, 60)
    assert pattern.min() == 0
    assert 0.95 < pattern.max() <= 1
    assert 0.15 < pattern.mean() < 0.85
    assert all(np.abs(pattern - TEXTURES[other](x, y, 0.1)).mean() > 0.1 for other in CLASSES if other != name)


def test_a_complete_set_is_left_alone_and_a_hurt_one_made_again(tmp_path: Path) -> None:
    root = generate_scenes(tmp_path / "set", 12, 10, seed=0, progress=False).root
    whole = content(root)
    picture = next((root / "train").rglob("*.jpg"))
    picture.write_bytes(b"kept")
    generate_scenes(root, 12, 10, seed=0, progress=False)
    assert picture.read_bytes() == b"kept"
    next((root / "truth").rglob("*.png")).unlink()
    generate_scenes(root, 12, 10, seed=0, progress=False)
    assert content(root) == whole


def test_a_stopped_run_and_another_set_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr("scripts.demo.scenes.render_scene", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate_scenes(root, 12, 10, seed=0, progress=False)
    assert json.loads((root / "scenes.json").read_text())["complete"] is False
    generate_scenes(root, 20, 10, seed=0, progress=False)
    generate_scenes(root, 12, 10, seed=0, progress=False)
    assert content(root) == content(generate_scenes(tmp_path / "fresh", 12, 10, seed=0, progress=False).root)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match="something else"):
        generate_scenes(tmp_path, 10, 10, seed=0, progress=False)
    assert (tmp_path / "train" / "mine.jpg").read_bytes() == b"precious"
    with pytest.raises(InputError, match="train 0"):
        generate_scenes(tmp_path / "new", 0, 10, seed=0, progress=False)


def slow_cell_truth(truth: np.ndarray, rows: int, columns: int) -> list[list[int]]:
    height, width = truth.shape
    answer = []
    for row in range(rows):
        answer.append([])
        for column in range(columns):
            held = [
                int(truth[y, x])
                for y in range(height)
                for x in range(width)
                if Fraction(row, rows) <= Fraction(2 * y + 1, 2 * height) < Fraction(row + 1, rows)
                and Fraction(column, columns) <= Fraction(2 * x + 1, 2 * width) < Fraction(column + 1, columns)
            ]
            winners = [c for c in set(held) if c != BACKGROUND and 2 * held.count(c) > len(held)]
            answer[-1].append(winners[0] if winners else -1)
    return answer


def test_cell_truth_equals_a_plain_loop() -> None:
    draw = random.Random(0)
    for _ in range(25):
        height, width, rows, columns = draw.randint(3, 15), draw.randint(3, 15), draw.randint(1, 6), draw.randint(1, 18)
        blocks = np.array([[draw.choice((0, 9, BACKGROUND)) for _ in range(4)] for _ in range(4)], np.uint8)
        truth = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))
        assert cell_truth(truth, (rows, columns)).tolist() == slow_cell_truth(truth, rows, columns)
    assert cell_truth(truth, 5).shape == (5, 5)


def test_map_accuracy_counts_object_cells_only(scenes: list[Scene]) -> None:
    truth = scenes[0].truth
    cells = cell_truth(truth, (10, 10))
    count = int((cells >= 0).sum())
    assert 5 < count < 60
    assert map_accuracy(np.maximum(cells, 0), truth) == (count, count)
    wrong = np.where(cells == scenes[0].label, (cells + 1) % 10, np.maximum(cells, 0))
    assert map_accuracy(wrong, truth) == (count - int((cells == scenes[0].label).sum()), count)
    assert map_accuracy(cells.T, truth)[0] < count


def test_random_crops_are_boxes_of_the_picture() -> None:
    """Pixels that name their place: every crop is upright, within the picture, of a fitting area, half are mirrored."""
    ramp = torch.arange(80, dtype=torch.uint8)
    picture = torch.stack([ramp.view(1, 80).expand(80, 80), ramp.view(80, 1).expand(80, 80), torch.zeros(80, 80)])
    crops = random_crops(picture.to(torch.uint8).expand(400, 3, 80, 80), 64, torch.Generator().manual_seed(0))
    x, y = crops[:, 0, 32], crops[:, 1, :, 32]
    torch.testing.assert_close(crops[:, 0], x[:, None, :].expand(-1, 64, -1), rtol=0, atol=1e-3)
    torch.testing.assert_close(crops[:, 1], y[:, :, None].expand(-1, -1, 64), rtol=0, atol=1e-3)
    wide, high = (x[:, 40] - x[:, 24]) * 4 / 80, (y[:, 40] - y[:, 24]) * 4 / 80
    assert 150 < (wide < 0).sum() < 250
    assert (high > 0).all()
    area = wide.abs() * high
    assert 0.49 < area.min() < 0.55
    assert 0.85 < area.max() < 1.01
    assert 0.74 < (wide.abs() / high).min() < 0.8
    # A box that stuck out would repeat the picture's edge.
    assert x[:, 1:-1].diff().abs().min() > 0.6
    assert y[:, 1:-1].diff().min() > 0.6
    assert 0 <= crops.min() < 2
    assert 77 < crops.max() <= 79


def test_the_teacher_trains_once_and_loads_as_a_teacher(made: SceneSet, tmp_path: Path) -> None:
    out = tmp_path / "teacher.safetensors"
    report = train_teacher(made.root, out, steps=3, progress=False)
    assert report.checkpoint == str(out)
    assert 0 <= report.test_accuracy <= 1
    assert report.images_per_s > 0
    first, written = out.read_bytes(), out.stat().st_mtime_ns
    assert train_teacher(made.root, out, steps=3, progress=False) == report
    assert out.stat().st_mtime_ns == written
    teacher = create_teacher(TeacherConfig("scripts.demo.teacher:scene_teacher", checkpoint=str(out)))
    assert (teacher.info.input_size, teacher.info.num_classes, teacher.info.grid) == (80, 10, (10, 10))
    pixels, labels = load_split(made.root / "test")
    maps = teacher.label(pixels.permute(0, 2, 3, 1).contiguous())
    right = (maps.mean((2, 3)).argmax(1) == labels).double().mean()
    assert right.item() == pytest.approx(report.test_accuracy, abs=1e-6)
    again = tmp_path / "again.safetensors"
    torch.rand(1)
    state = torch.get_rng_state()
    train_teacher(made.root, again, steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights(again) == weights(out)
    train_teacher(made.root, out, steps=3, progress=False, seed=1)
    assert out.read_bytes() != first
    assert weights(out) != weights(again)


def weights(file: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: value.numpy().tobytes() for name, value in load_file(file).items()}


def test_the_teacher_learns(made: SceneSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fits twenty scenes of two classes in a few dozen steps: gradients, schedule and labels are joined rightly."""
    pixels, labels = load_split(made.root / "train")
    two = torch.isin(labels, torch.tensor([CLASSES.index("stripes"), CLASSES.index("dots")]))
    monkeypatch.setattr("scripts.demo.teacher.load_split", lambda *_: (pixels[two], labels[two]))
    report = train_teacher(made.root, tmp_path / "two.safetensors", steps=30, progress=False)
    assert report.test_accuracy > 0.85


def test_the_teacher_refuses_what_it_cannot_use(made: SceneSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not contain a complete set"):
        train_teacher(tmp_path, tmp_path / "t.safetensors", steps=3, progress=False)
    with pytest.raises(InputError, match=r"t\.pt"):
        train_teacher(made.root, tmp_path / "t.pt", steps=3, progress=False)
