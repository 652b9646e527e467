"""The audit: its three errors are what a calculation by hand gives, and it runs no stranger's teacher."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import GRID, SIDE, ColourTeacher

from labeler import InputError, LabelStore, ScoreMaps, TeacherConfig, label_images
from labeler.__main__ import main
from labeler.base.whole_files import read_sealed, sealed
from labeler.checks.audit import SHARES, audit_labels, audit_store
from labeler.checks.audit_errors import crop_outputs, crop_scores, errors_of, fractions, kl, random_windows
from labeler.checks.relabel import teacher_of


class OneSided(ColourTeacher):
    """Adds 1 to the score of class 0 in the left half of what it sees, and takes 1 away in the right half."""

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        maps = super().score_maps(images)
        maps[:, 0] += torch.tensor([1.0, 1.0, -1.0, -1.0])
        return maps


def one_sided_teacher() -> torch.nn.Module:
    return OneSided()


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(0))


def test_of_a_teacher_that_turns_with_the_picture_only_crops_are_left(store, images):
    found = audit_store(store, images, 12, device="cpu")
    assert (found.images, found.missing, found.flip, found.input_size) == (12, 0, True, SIDE)
    assert found.mirror == pytest.approx(0, abs=1e-5)
    assert found.mirror_averaged == pytest.approx(0, abs=1e-5)
    # The tiny teacher reads colours, which a crop keeps but for the parts of cells that it cuts.
    assert list(found.crop) == ["0.9", "0.7", "0.5"]
    assert all(0 < error < 0.06 for error in found.crop.values())


def test_storage_is_what_the_markers_say(images, tmp_path, config):
    coarse = dataclasses.replace(config, levels=8, threshold=0.02)
    summary = label_images(images, tmp_path / "labels", coarse)
    assert summary.kl > 1e-3
    found = audit_store(tmp_path / "labels", images, 12, device="cpu")
    assert found.storage == pytest.approx(summary.kl, rel=0.01)
    assert found.storage_of_reference == pytest.approx(found.storage / found.reference)


@pytest.mark.parametrize("flip", [False, True])
def test_the_mirror_error_of_a_one_sided_teacher_by_hand(images, tmp_path, config, flip):
    teacher = TeacherConfig("test_labeler_audit:one_sided_teacher", flip=flip)
    label_images(images, tmp_path / "labels", dataclasses.replace(config, teacher=teacher))
    labels = LabelStore(tmp_path / "labels")
    found = audit_store(labels.path, images, 100, device="cpu")
    _, decoder = teacher_of(labels, "cpu")
    pixels = decoder([(images / key).read_bytes() for key in labels.keys]).pixels.float() / 127.5 - 1
    plain = ColourTeacher().score_maps(pixels.permute(0, 3, 1, 2)).double().numpy()
    between, to_average = [], []
    for logits in plain.transpose(0, 2, 3, 1).reshape(-1, 4, 6):  # rows of cells
        for column, cell in enumerate(logits):
            lean = (1.0 if column < 2 else -1.0) * np.eye(6)[0]
            one, other, both = log_softmax(cell + lean), log_softmax(cell - lean), log_softmax(cell)
            between.append((np.exp(one) * (one - other)).sum())
            to_average.append((np.exp(one) * (one - both)).sum())
    assert np.mean(between) > 0.1
    assert found.mirror == pytest.approx(np.mean(between), rel=1e-3)
    assert found.mirror_averaged == pytest.approx(np.mean(to_average), rel=1e-3)
    assert found.flip == flip
    assert ("`--tta flip` is on" in found.text()) == flip
    assert ("less with `--tta flip`" in found.text()) != flip
    # What is stored is held against the map that this teacher stores: averaged or not.
    assert found.storage < 0.01


def test_a_crop_of_everything_differs_by_what_storage_costs(store, images):
    labels = LabelStore(store)
    teacher, decoder = teacher_of(labels, "cpu")
    files = {row: (images / key).read_bytes() for row, key in enumerate(labels.keys)}
    errors, logits = errors_of(labels, files, teacher, decoder, 0, (1.0, 0.9))
    assert errors.shape == (12, 6)
    storage, *_, everything, most = errors.mean(0)
    assert everything < 4 * storage < 0.1 * most
    whole = kl(logits.mean((2, 3)), crop_scores(labels.read(range(12)).to_torch(), torch.tensor([[0, 0, 1, 1.0]] * 12)))
    np.testing.assert_allclose(errors[:, 4], whole, atol=1e-6)


def test_scores_of_a_crop_are_the_mean_over_its_area():
    random = np.random.default_rng(0)
    scores, background = random.normal(size=(2, 3, 4, 5)), random.normal(size=(2, 4, 5)) - 3
    region = np.array([[0, 0, 1, 1], [0.2, 0.1, 0.8, 0.9]])
    classes, tail = np.array([[0, 2, 5], [6, 1, -1]]), np.array([[3], [-1]])
    maps = ScoreMaps(classes, scores, background, region, 7, tail, np.array([[0.75], [0.0]]))
    boxes = np.array([[0.13, 0.21, 0.57, 0.93], [0.3, 0.2, 0.7, 0.5]])
    found = crop_scores(maps.to_torch(), torch.from_numpy(boxes)).numpy()
    for image in range(2):
        y0, x0, y1, x1 = region[image]
        n = 800  # points of a fine raster in each cell's place
        y = (boxes[image, 0] + (np.arange(n) + 0.5) / n * (boxes[image, 2] - boxes[image, 0]) - y0) / (y1 - y0) * 4
        x = (boxes[image, 1] + (np.arange(n) + 0.5) / n * (boxes[image, 3] - boxes[image, 1]) - x0) / (x1 - x0) * 5
        wanted = np.full(7, background[image][np.ix_(y.astype(int), x.astype(int))].mean())
        if image == 0:
            wanted[3] += 0.75
        for place, number in enumerate(classes[image]):
            if number >= 0:
                wanted[number] = scores[image, place][np.ix_(y.astype(int), x.astype(int))].mean()
        np.testing.assert_allclose(found[image], wanted, atol=5e-3)


def test_crops_lie_in_what_the_map_covers_and_are_seen_alone():
    images = [np.zeros((40, 60, 3), np.uint8), np.full((33, 21, 3), 255, np.uint8)]
    images[0][:, 30:] = 255
    draws = [np.random.default_rng(i) for i in range(2)]
    regions = [[0.25, 0.1, 0.75, 0.9], [0.0, 0.0, 1.0, 1.0]]
    for share in SHARES:
        windows = random_windows(images, regions, share, draws)
        for (y0, x0, y1, x1), image, region in zip(windows, images, regions, strict=True):
            height, width = image.shape[:2]
            assert abs((y1 - y0) - share * (region[2] - region[0]) * height) <= 0.5
            assert abs((x1 - x0) - share * (region[3] - region[1]) * width) <= 0.5
            assert region[0] * height - 1 <= y0 < y1 <= region[2] * height + 1
            assert region[1] * width - 1 <= x0 < x1 <= region[3] * width + 1
    assert random_windows(images, regions, 1.0, draws)[1] == (0, 0, 33, 21)
    boxes = fractions([(10, 30, 20, 60), (0, 0, 33, 21)], images)
    np.testing.assert_allclose(boxes, [[0.25, 0.5, 0.5, 1], [0, 0, 1, 1]])

    class Mean:
        """Answers with the mean colour."""

        info = dataclasses.make_dataclass("Info", ["input_size", "interpolation"])(8, "bilinear")

        def label(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.float().permute(0, 3, 1, 2)

    found = crop_outputs(Mean(), images, [(0, 30, 40, 60), (0, 0, 33, 21)])
    assert (found == 255).all(), "no pixel from outside the crop"


def test_a_strangers_teacher_is_not_run(store, images, tmp_path, capsys):
    copied = tmp_path / "copied"
    shutil.copytree(store, copied)
    # As if another had written it: what is remembered goes by the content of the markers.
    marker = sorted(copied.glob("shard-*.json"))[-1]
    marker.write_bytes(sealed({**read_sealed(marker), "note": "another's"}))
    with pytest.raises(InputError, match=r"not written here in one run.*`trusted`"):
        audit_store(copied, images, 3, device="cpu")
    assert audit_store(copied, images, 3, device="cpu", trusted=True).images == 3
    command = ["report", str(copied), "--images", str(images), "--out", str(tmp_path / "r.html"), "--audit", "3"]
    assert main([*command, "--device", "cpu", "--quiet"]) == 2
    assert "or omit --audit" in capsys.readouterr().err
    assert main([*command, "--device", "cpu", "--quiet", "--trusted"]) == 0


def test_fewer_images_than_asked_for_are_counted(store, images):
    keys = LabelStore(store).keys
    (images / keys[0]).unlink()
    Image.new("RGB", (40, 40)).save(images / keys[1])
    found, maps = audit_labels(LabelStore(store), images, 1000, device="cpu")
    assert (found.images, found.missing) == (10, 2)
    assert maps.shape == (10, 6, GRID, GRID)
    assert "10 images, 2 more not found or changed" in found.text()
    with pytest.raises(InputError, match="nothing to audit"):
        audit_store(store, images, 0, device="cpu")
    for key in keys[1:]:
        (images / key).unlink()
    with pytest.raises(InputError, match="none of the images"):
        audit_store(store, images, 12, device="cpu")


def test_the_seed_draws_the_images(store, images):
    first, again, other = (audit_store(store, images, 4, device="cpu", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.crop != other.crop


def test_label_says_it_at_its_end(images, tmp_path, capsys):
    command = [
        "label",
        str(images),
        "--teacher",
        "tiny:colour_teacher",
        "--device",
        "cpu",
        "--decoder",
        "pil",
        "--quiet",
    ]
    assert main([*command, "--store", str(tmp_path / "a"), "--audit", "5"]) == 0
    assert "audit: KL in nats, means over 5 images" in capsys.readouterr().out
    assert main([*command, "--store", str(tmp_path / "a"), "--audit", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["audit"]
    assert told["images"] == 5
    assert told["crop"].keys() == {"0.9", "0.7", "0.5"}
    assert main([*command, "--store", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["audit"] is None
