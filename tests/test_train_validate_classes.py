"""`validate`, class by class: accuracies, confusions and their files, alone and under ranks, with ReaL labels too."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_runs import forks
from tiny import CLASSES, encoded, picture
from tiny_runs import tiny_config, tiny_data

import train
from train.__main__ import main
from train.evaluation.results import write_mask_scores
from train.evaluation.single_images import load_image, normalized
from train.evaluation.tally import class_accuracies
from train.evaluation.validate import Validation, load_trained, validate

Answers = list[tuple[int, list[int]]]  # true class and first five of each image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"), 29)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """Learnt well enough for some answers to be right, and some wrong."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.fit(tiny_config(*data, out, **{"optimizer.lr": 0.01, "schedule.steps": 12}))
    return out


@pytest.fixture(scope="module")
def answers(run, data) -> Answers:
    """Of a plain loop over single images."""
    return [(int(path.parent.name[-1]), first_five(run, path)) for path in sorted(data[0].rglob("*.jpg"))]


@pytest.fixture(scope="module")
def found(run, data) -> Validation:
    return validate(run, data[0], backend="pil", device="cpu", batch_size=4, progress=False)


def first_five(run: Path, path: Path) -> list[int]:
    trained = load_trained(run)
    with torch.inference_mode():
        return trained.net(normalized([load_image(path, trained)], trained))[0].topk(5).indices.tolist()


def pairs(answers: Answers) -> Counter:
    return Counter((true, five[0]) for true, five in answers if true != five[0])


def test_each_classs_accuracy_is_that_of_a_plain_loop_and_the_worst_stands_first(found, answers):
    assert sorted(one.id for one in found.per_class) == list(range(CLASSES))
    for one in found.per_class:
        own = [five for true, five in answers if true == one.id]
        assert (one.name, one.images) == (f"class{one.id}", len(own))
        assert one.top1 == sum(five[0] == one.id for five in own) / len(own)
        assert one.top5 == sum(one.id in five for five in own) / len(own)
    order = [one.top1 for one in found.per_class]
    assert order == sorted(order)
    assert len(set(order)) > 1
    # Together they are the whole.
    assert sum(one.top1 * one.images for one in found.per_class) / found.images == pytest.approx(found.top1)
    assert sum(one.top5 * one.images for one in found.per_class) / found.images == pytest.approx(found.top5)


def test_of_classes_that_are_equally_bad_that_with_more_images_stands_first():
    seen = np.array([[2, 0, 1], [1, 0, 1], [1, 0, 1], [3, 0, 0], [0, 0, 1]])
    assert [one.id for one in class_accuracies(seen, str)] == [3, 1, 2, 0]


def test_confusions_are_those_of_a_plain_loop_and_the_most_frequent_stands_first(found, answers):
    expected = pairs(answers)
    assert {(one.id, one.taken_for_id): one.images for one in found.confusions} == expected
    assert [one.images for one in found.confusions] == sorted(expected.values(), reverse=True)
    assert all((one.name, one.taken_for) == (f"class{one.id}", f"class{one.taken_for_id}") for one in found.confusions)
    assert len(expected) > 2


def test_the_command_prints_what_is_asked_for(run, data, found, capsys):
    usual = ["validate", str(run), "--images", str(data[0]), "--device", "cpu", "--backend", "pil", "--quiet"]
    assert main(usual) == 0
    assert capsys.readouterr().out == found.text() + "\n"
    assert main([*usual, "--per-class", "--confusions", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == found.text()
    worst, often = found.per_class[0], found.confusions[:2]
    assert lines[2].split() == [f"{worst.top1:.2%}", f"{worst.top5:.2%}", str(worst.images), worst.name]
    assert [line.split() for line in lines[-2:]] == [[str(one.images), one.name, "->", one.taken_for] for one in often]
    assert len(lines) == 1 + 1 + CLASSES + 1 + 2
    assert main([*usual, "--json"]) == 0
    assert not {"per_class", "confusions"} & json.loads(capsys.readouterr().out).keys()
    assert main([*usual, "--json", "--per-class", "--confusions", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["per_class"] == [asdict(one) for one in found.per_class]
    assert told["confusions"] == [asdict(one) for one in often]


def test_two_ranks_write_the_files_that_one_writes(run, data, found, answers, tmp_path):
    """Odd shares: 29 images in batches of four on two ranks. What is summed is summed exactly."""
    whole, classes, matrix = (tmp_path / "new" / name for name in ("all.json", "classes.csv", "matrix.csv"))
    usual = ["validate", str(run), "--images", str(data[0]), "--device", "cpu", "--backend", "pil", "--quiet"]
    usual += ["--batch-size", "4", "--matrix", str(matrix)]
    for ranks, out in ((2, whole), (1, classes)):
        assert [one.status for one in forks().run("train.__main__:main", [*usual, "--out", str(out)], ranks=ranks)] == (
            [0] * ranks
        )
        with open(matrix, newline="") as file:
            heading, *rows = csv.reader(file)
        names = [f"{c} class{c}" for c in range(CLASSES)]
        assert heading == ["true class", *names]
        assert [row[0] for row in rows] == names
        every = Counter((true, five[0]) for true, five in answers)
        assert [[int(cell) for cell in row[1:]] for row in rows] == [
            [every[a, b] for b in range(CLASSES)] for a in range(CLASSES)
        ]
    assert json.loads(whole.read_text()) == json.loads(json.dumps(asdict(found)))
    with open(classes, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [one.name for one in found.per_class]
    assert [float(row["top1"]) for row in rows] == [one.top1 for one in found.per_class]
    assert {path.name for path in whole.parent.iterdir()} == {"all.json", "classes.csv", "matrix.csv"}


def test_files_that_cannot_be_written_are_told_before_any_image_is(run, data, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    for options, expected in (
        (["--out", tmp_path / "a.txt"], "a name that ends in .json or .csv"),
        (["--matrix", tmp_path / "a.json"], "a name that ends in .csv"),
        (["--out", tmp_path / "folder.csv"], "a folder of that name"),
        (["--matrix", tmp_path / "file" / "a.csv"], "cannot be written"),
    ):
        arguments = ["validate", str(run), "--images", "nowhere", *map(str, options)]
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert expected in told
        assert told.count("\n") == 1


def test_with_real_labels_images_of_one_right_class_belong_to_it_and_others_to_none(run, tmp_path, capsys):
    real = [[0, 3], [], [5], [1, 2, 4], [3], [0], [2], [4, 5], [3]]
    answers: Answers = []
    (tmp_path / "val").mkdir()
    for i, classes in enumerate(real):
        path = tmp_path / "val" / f"ILSVRC2012_val_{i + 1:08d}.JPEG"
        path.write_bytes(encoded(picture(100 + i)))
        if len(classes) == 1:
            answers.append((classes[0], first_five(run, path)))
    (tmp_path / "real.json").write_text(json.dumps(real))
    found = validate(run, tmp_path / "val", real=tmp_path / "real.json", backend="pil", device="cpu", progress=False)
    assert (found.images, found.several) == (8, 3)
    assert {one.id: one.images for one in found.per_class} == Counter(true for true, _ in answers)
    assert {(one.id, one.taken_for_id): one.images for one in found.confusions} == pairs(answers)
    assert "3 images have several right classes" in found.text(per_class=True)
    assert "several" not in found.text()


@pytest.mark.parametrize("extension", ["json", "csv"])
def test_the_iou_of_each_class_is_written(tmp_path, extension):
    score = {"miou": 0.5, "names": ["road", "sky, blue"], "iou": [0.75, 0.25], "pixels": [300, 100]}
    write_mask_scores(score, tmp_path / f"out.{extension}")
    text = (tmp_path / f"out.{extension}").read_text()
    if extension == "json":
        assert json.loads(text) == score
    else:
        rows = [["name", "iou", "pixels"], ["road", "0.75", "300"], ["sky, blue", "0.25", "100"]]
        assert list(csv.reader(text.splitlines())) == rows
