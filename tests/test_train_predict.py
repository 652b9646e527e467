"""`predict`: the pixels, classes and token maps of single images, and what it refuses.

Legend: B images; C classes; S input side; h×w token grid.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from tiny import CLASSES, encoded, picture
from tiny_runs import tiny_config, tiny_data

import train
from labeler import LabelerConfig, TeacherConfig, label_images
from labeler.report.charts import COLOURS
from labeler.sources.decoding.pixels import ORIENTATION_TAG
from model.backbones.vim import Vim
from pipeline.batch_picture import FAINTEST, GAP, LINE, MARGIN, MIDDLE, assign_colours
from train.__main__ import main
from train.evaluation.predict import ClassShare, Prediction, predict
from train.evaluation.single_images import load_image, normalized
from train.evaluation.token_map import OPACITY, PANEL, draw_map
from train.evaluation.validate import Trained, load_trained
from train.loaders import evaluation_loader
from train.ranks.distributed import Ranks

GRID = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train.fit(tiny_config(*data, out, **{"ema.decay": 0.5, "optimizer.lr": 0.01}))
    return out


def files(root: Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*.*"))


def odd_images(root: Path) -> Path:
    """One image of each kind that is easily shown wrong: turned by its tag, wide, tall, grey, with a palette."""
    tag = Image.Exif()
    tag[ORIENTATION_TAG] = 6
    contents = {
        "turned.jpg": encoded(picture(1, 40, 90), exif=tag),
        "wide.png": encoded(picture(2, 33, 131), "PNG"),
        "tall.webp": encoded(picture(3, 140, 37), "WEBP", lossless=True),
        "grey.png": encoded(picture(4).convert("L"), "PNG"),
        "palette.png": encoded(picture(5).quantize(16), "PNG"),
    }
    (root / "class0").mkdir(parents=True)
    for name, data in contents.items():
        (root / "class0" / name).write_bytes(data)
    return root


def loaded(images: Path, trained: Trained) -> torch.Tensor:
    """[N, 3, S, S]: the evaluation's images, in the order of their names."""
    loader = evaluation_loader(
        str(images),
        image_size=trained.side,
        grid=(GRID, GRID),
        num_classes=CLASSES,
        class_folders={f"class{i}": i for i in range(CLASSES)},
        transform=trained.transform,
        ranks=Ranks(0, 1, torch.device("cpu")),
        batch_size=4,
        backend="pil",
        threads=1,
        progress=False,
    )
    return torch.cat([batch.images for batch in loader])


@pytest.mark.parametrize(("crop_pct", "crop_mode"), [(0.9, "center"), (0.7, "squash"), (1.0, "center")])
def test_the_network_sees_the_pixels_of_the_evaluation(run, tmp_path, crop_pct, crop_mode):
    images = odd_images(tmp_path / "images")
    trained = load_trained(run)
    trained.transform.update({"crop_pct": crop_pct, "crop_mode": crop_mode, "std": [0.2, 0.3, 0.4]})
    expected = loaded(images, trained)
    inputs = normalized([load_image(Path(path), trained) for path in files(images)], trained)
    # The same bytes; only their normalisation is in another order, which rounds differently in float32.
    assert (inputs - expected).abs().max() < 1e-5
    with torch.inference_mode():
        assert (trained.net(inputs) - trained.net(expected)).abs().max() < 1e-4
    turned = Image.open(images / "class0/turned.jpg")
    assert ImageOps.exif_transpose(turned).size == turned.size[::-1]  # it does test turning


def test_images_are_turned_in_evaluation_as_they_were_in_training(data, tmp_path):
    """A store that ignores orientation tags has labels of the pixels as they lie; all that is shown must lie so."""
    turned = Path(shutil.copytree(data[0], tmp_path / "images")) / "class0" / "img000.jpg"
    plain, tag = tmp_path / "plain.jpg", Image.Exif()
    tag[ORIENTATION_TAG] = 6
    plain.write_bytes(encoded(picture(1), quality=95))
    turned.write_bytes(encoded(picture(1), quality=95, exif=tag))
    config = LabelerConfig(
        TeacherConfig("tiny:colour_teacher"), orientation="ignore", decoder="pil", threads=1, progress=False
    )
    label_images(turned.parents[1], tmp_path / "labels", config)
    settings = {"data.validation": str(turned.parents[1]), "schedule.steps": 1}
    train.fit(tiny_config(turned.parents[1], tmp_path / "labels", tmp_path / "run", **settings))
    trained = load_trained(tmp_path / "run")
    upright = dataclasses.replace(trained, transform={**trained.transform, "orientation": "exif"})
    assert np.array_equal(load_image(turned, trained), load_image(plain, trained))
    assert not np.array_equal(load_image(turned, upright), load_image(plain, upright))
    inputs = normalized([load_image(Path(path), trained) for path in files(turned.parents[1])], trained)
    assert (inputs - loaded(turned.parents[1], trained)).abs().max() < 1e-5


@pytest.mark.parametrize("ema", [False, True])
def test_the_classes_printed_are_the_networks(run, data, capsys, ema):
    paths = files(data[0])
    command = ["predict", str(run), *paths, "--top", "3", "--json", "--device", "cpu", *["--ema"] * ema]
    assert main(command) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    trained = load_trained(run, ema)
    with torch.inference_mode():
        expected = trained.net(loaded(data[0], trained)).softmax(1)
    assert [one["image"] for one in found] == paths
    for one, p in zip(found, expected, strict=True):
        assert [share["id"] for share in one["classes"]] == p.topk(3).indices.tolist()
        assert [share["probability"] for share in one["classes"]] == pytest.approx(p.topk(3).values.tolist(), abs=1e-5)
        assert all(share["name"] == f"class{share['id']}" for share in one["classes"])
        assert one["map"] is None


def predicted(run: Path, paths: list, **settings: object) -> list[Prediction]:
    return list(predict(run, paths, device="cpu", progress=False, **settings))


def test_average_and_weights_answer_differently(run, data):
    assert predicted(run, files(data[0])[:1]) != predicted(run, files(data[0])[:1], ema=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_do_not_change_the_answers(run, data, threads):
    paths = files(data[0])
    whole = predicted(run, paths)
    parts = predicted(run, paths, batch_size=5, threads=threads)
    assert [one.image for one in parts] == [one.image for one in whole] == paths
    for a, b in zip(whole, parts, strict=True):
        for x, y in zip(a.classes, b.classes, strict=True):
            # Matrix products of other sizes round differently.
            assert x.id == y.id
            assert x.probability == pytest.approx(y.probability, abs=1e-5)


def test_a_class_has_its_name_or_its_folders_or_its_number(run):
    trained = load_trained(run)
    named = dataclasses.replace(trained, class_names=["cat", "dog"])
    assert [named.class_name(i) for i in (1, 2)] == ["dog", "class2"]
    assert dataclasses.replace(named, class_folders={}).class_name(2) == "class 2"


def test_each_token_has_the_colour_of_its_class(run):
    """Over a white image a tint of strength s is s parts colour and 1 − s parts white."""
    trained = load_trained(run)
    order = torch.tensor([0] * 7 + [3] * 4 + [5] * 3 + [1] * 2)
    first = order[torch.randperm(16, generator=torch.Generator().manual_seed(1))].view(GRID, GRID)
    p = torch.full((CLASSES, GRID, GRID), 0.04).scatter_(0, first[None], 0.8)
    white = np.full((32, 32, 3), 255, np.uint8)
    page = draw_map(white, p, [ClassShare(3, "class3", 0.5)], "a.jpg", trained)
    colours = assign_colours([0, 3, 5, 1])
    assert len(set(colours.values())) == 4
    step, left = PANEL // GRID, MARGIN + PANEL + GAP
    strength = OPACITY * (FAINTEST + (1 - FAINTEST) * 0.8)
    for y in range(GRID):
        for x in range(GRID):
            place = (left + step * x + step // 2, MARGIN + LINE + step * y + step // 2)
            expected = 255 + strength * (np.array(colours[int(first[y, x])]) - 255.0)
            # Strength and colour are rounded to whole levels.
            assert np.abs(np.array(page.getpixel(place)) - expected).max() <= 2, (y, x)
    # In the legend the classes stand by their share of the tokens.
    column = MARGIN + 2 * (PANEL + GAP) + 4
    told = [page.getpixel((column, MARGIN + LINE + i * LINE + 8)) for i in range(5)]
    assert told == [colours[0], colours[3], colours[5], colours[1], (255, 255, 255)]
    assert set(colours.values()) <= set(COLOURS)
    # Below stands what a stronger colour says, from the faintest tint to the strongest.
    caption = np.asarray(page)[MARGIN + LINE + PANEL + 6 + 2 * LINE :].reshape(-1, 3).astype(float)
    for s in (FAINTEST, 1.0):
        tint = np.array(MIDDLE) + OPACITY * s * (np.array(COLOURS[0]) - MIDDLE)
        assert np.abs(caption - tint).max(1).min() <= 2


def test_a_map_of_more_classes_than_its_legend_has_room_for_says_how_many_are_left(run, monkeypatch):
    told = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda draw, place, s, *more: told.append(s) or text(draw, place, s, *more)
    )
    trained = dataclasses.replace(load_trained(run), class_names=[f"name{i}" for i in range(64)])
    p = torch.eye(64).view(64, 8, 8)
    page = draw_map(np.zeros((32, 32, 3), np.uint8), p, [ClassShare(3, "name3", 0.5)], "a.jpg", trained)
    named = [one for one in told if one.startswith("2% name")]
    assert 5 < len(named) < 64
    assert f"and {64 - len(named)} more classes" in told
    assert "other classes." in told  # more than there are colours
    assert page.height < 420


def test_a_picture_shows_the_token_head_on_the_evaluations_image(run, data, tmp_path, capsys):
    paths = files(data[0])[:2]
    assert main(["predict", str(run), *paths, "--map", "--out", str(tmp_path / "maps"), "--device", "cpu"]) == 0
    told = capsys.readouterr().out.splitlines()
    trained = load_trained(run)
    with torch.inference_mode():
        tokens = trained.net.score_maps(loaded(data[0], trained)[:2]).softmax(1)
    for i, path in enumerate(paths):
        written = tmp_path / "maps" / f"{Path(path).stem}.map.png"
        assert f"  map: {written}" in told
        classes = predicted(run, [path])[0].classes
        expected = draw_map(load_image(Path(path), trained), tokens[i], classes, Path(path).name, trained)
        found = np.asarray(Image.open(written)).astype(int)
        # Strengths that a rounding error moves over the next whole level.
        assert np.abs(found - np.asarray(expected)).max() <= 2
        assert len(tokens[i].argmax(0).unique()) > 1  # or a map that is turned would look the same


def test_pictures_replace_no_image_and_not_each_other(run, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    names = ["one.png", "one.bmp", "one.map.png"]
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded(picture(i), name[-3:].upper()))
    before = {name: (folder / name).read_bytes() for name in names}
    found = predicted(run, [folder / name for name in names], maps=folder)
    assert len({one.map for one in found}) == 3
    assert len(list(folder.iterdir())) == 6
    assert {name: (folder / name).read_bytes() for name in names} == before


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error of use."""
    assert main(["predict", *map(str, arguments), "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    return told.err


def test_a_path_that_is_not_there_is_told_before_anything_else_is(run, data, tmp_path, capsys):
    for path, expected in ((tmp_path / "missing.jpg", "No such file"), (tmp_path / "empty", "no images below")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        table = tmp_path / "table.csv"
        told = refusal(capsys, run, files(data[0])[0], path, "--map", "--out", tmp_path / "maps", "--csv", table)
        assert path.name in told
        assert expected in told
        assert not table.exists()
    assert not (tmp_path / "maps").exists()


def test_wrong_use_is_refused_in_one_line(run, data, tmp_path, capsys):
    good = files(data[0])[0]
    assert "--top must be 1 or more: got 0" in refusal(capsys, run, good, "--top", 0)
    assert "--out is the folder" in refusal(capsys, run, good, "--out", tmp_path)
    assert "no checkpoint" in refusal(capsys, tmp_path, good)
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(capsys, run, good, "--map", "--out", tmp_path / "file")


def test_a_model_without_a_token_head_predicts_but_draws_no_map(data, tmp_path, capsys):
    torch.manual_seed(0)
    net = Vim(img_size=32, embed_dim=8, depth=1, stem="patch", aux_head=False, num_classes=3)
    torch.save(net.state_dict(), path := tmp_path / "vim.pth")
    good = files(data[0])[0]
    assert main(["predict", str(path), good, "--device", "cpu"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == good
    assert sorted(line.split("%  ")[1] for line in told[1:]) == ["class 0", "class 1", "class 2"]
    assert "no auxiliary head" in refusal(capsys, path, good, "--map", "--out", tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_a_map_of_a_head_that_was_never_trained_says_so(data, tmp_path, capsys, caplog):
    config = tiny_config(data[0], None, tmp_path / "run", **{"loss.dense_weight": 0, "schedule.steps": 1})
    train.fit(config)
    good = files(data[0])[0]
    for arguments, warned in ((["--map", "--out", str(tmp_path)], True), ([], False)):
        caplog.clear()
        assert main(["predict", str(tmp_path / "run"), good, "--device", "cpu", *arguments]) == 0
        assert ("untrained head" in caplog.text) == warned
