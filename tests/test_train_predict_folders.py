"""`predict` on folders and lists of many images: what it finds, leaves out, prints as it goes, and writes."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import encoded, make_images, picture
from tiny_runs import tiny_config, tiny_data

import train
from labeler.sources.folder_source import find_images
from train.__main__ import main
from train.errors import TrainError
from train.evaluation import single_images
from train.evaluation.predict import predict


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train.fit(tiny_config(*data, out, **{"schedule.steps": 1}))
    return out


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder as people have them: images in sub-folders, text beside them, and some that are none or broken."""
    root = make_images(tmp_path / "mixed", 7)
    bad = {
        "class1/text.jpg": b"no image",
        "class1/empty.jpg": b"",
        "class2/cut.jpg": encoded(picture(0))[:-100],
        "moving.gif": encoded(picture(0), "GIF"),
    }
    for name, content in {**bad, "notes.txt": b"not looked at", "class0.png": encoded(picture(9), "PNG")}.items():
        (root / name).write_bytes(content)
    (root / "class0" / "away.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    return root


BAD = {
    "class0/away.jpg": "a link that leaves the image root",
    "class1/text.jpg": "not an image",
    "class1/empty.jpg": "not an image",
    "class2/cut.jpg": "cannot be decoded",
    "moving.gif": "GIF is not a format",
}


def command(run: Path, *arguments: object) -> list[str]:
    return ["predict", str(run), *map(str, arguments), "--device", "cpu"]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_folder_is_its_images_in_the_labelers_order_without_those_that_are_none(run, mixed, capsys, batch_size):
    assert main(command(run, mixed, "--json", "--batch-size", batch_size)) == 3
    told = capsys.readouterr()
    found = [json.loads(line) for line in told.out.splitlines()]
    assert [one["image"] for one in found] == [f"{mixed}/{key}" for key in find_images(mixed).keys]
    problems = {os.path.relpath(one["image"], mixed): one["problem"] for one in found if one["problem"]}
    assert problems.keys() == BAD.keys()
    for key, reason in BAD.items():
        assert reason in problems[key]
        assert f"{mixed}/{key}: left out, {problems[key]}" in told.err
    assert told.err.splitlines()[-1].endswith("5 of 13 images were left out")
    # Each answer is that of its own image, whatever was left out before it in the batch.
    good = [one for one in found if not one["problem"]]
    alone = [next(predict(run, [one["image"]], device="cpu")) for one in good]
    for one, expected in zip(good, alone, strict=True):
        first = expected.classes[0]
        assert (one["classes"][0]["id"], one["classes"][0]["name"]) == (first.id, first.name)
        assert one["classes"][0]["probability"] == pytest.approx(first.probability, abs=1e-5)


def test_a_bad_image_is_left_out_also_where_it_is_named(run, mixed, capsys):
    """And only the good ones are printed."""
    assert main(command(run, mixed / "class2/cut.jpg", mixed / "class0.png")) == 3
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == f"{mixed}/class0.png"
    assert "cut.jpg" not in told.out
    assert "1 of 2 images were left out" in told.err
    (mixed / "pixel.png").write_bytes(encoded(picture(0, 1, 1), "PNG"))
    assert main(command(run, mixed / "class0.png", mixed / "pixel.png")) == 0  # small is not bad


def test_a_failure_of_the_machine_is_held_against_no_image(run, mixed, monkeypatch):
    def no_more_files(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    found = predict(run, [mixed / "class0.png"], device="cpu")
    monkeypatch.setattr(Path, "read_bytes", no_more_files)
    with pytest.raises(TrainError, match=r"class0.png' cannot be read on this machine: got Too many open files"):
        next(found)


def test_images_are_named_on_standard_input(run, mixed, capsys, monkeypatch):
    names = [f"{mixed}/class0.png", "", f"{mixed}/gone.jpg", f"{mixed}/class1", "\0"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(names) + "\n"))
    assert main(command(run, "-", "--json")) == 3
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["image"] for one in found] == [names[i] for i in (0, 2, 3, 4)]
    assert [bool(one["classes"]) for one in found] == [True, False, False, False]
    assert [one["problem"] for one in found[1:3]] == [
        "cannot be read: No such file or directory",
        "cannot be read: it is a folder",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(command(run, "-")) == 2
    assert "no image is named on standard input" in capsys.readouterr().err


@pytest.mark.parametrize("top", [1, 3])
def test_the_table_has_a_line_for_each_image_and_timms_columns(run, mixed, tmp_path, capsys, top):
    (mixed / "class0" / 'a,"b".png').write_bytes(encoded(picture(3), "PNG"))
    out = tmp_path / "new" / "table.csv"
    assert main(command(run, mixed, "--top", top, "--json", "--csv", out)) == 3
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    good = [one for one in found if not one["problem"]]
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    ends = [""] if top == 1 else [f"_{i}" for i in range(top)]
    assert list(rows[0]) == ["filename", *(f"{name}{end}" for name in ("index", "label", "prob") for end in ends)]
    assert [row["filename"] for row in rows] == [one["image"] for one in good]
    for row, one in zip(rows, good, strict=True):
        for end, share in zip(ends, one["classes"], strict=True):
            assert (int(row["index" + end]), row["label" + end]) == (share["id"], share["name"])
            assert float(row["prob" + end]) == pytest.approx(share["probability"], rel=1e-5)


def test_a_table_that_cannot_be_written_is_told_before_any_image_is(run, data, tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "table.csv"):
        assert main(command(run, data[0], "--csv", path)) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert "the table" in told.err
        assert "cannot be written" in told.err


def test_an_interrupted_run_leaves_no_part_of_a_table(run, data, tmp_path):
    """Its lines are printed as they come: after the first, Ctrl-C."""
    listed = "\n".join(str(path) for path in sorted(data[0].rglob("*.jpg")) * 500)
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *command(run, "-", "--json", "--csv", tmp_path / "table.csv")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdin.write(listed)
    process.stdin.close()
    assert json.loads(process.stdout.readline())["classes"]
    assert len(list(tmp_path.iterdir())) == 1  # what will be the table
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    told = process.stderr.read()
    assert process.wait() == 130
    assert told.strip().endswith("interrupted")
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_predictions_come_while_later_images_are_not_yet_read(run, data, monkeypatch):
    """At most the batch in hand and two more: the first answer cannot have waited for all, nor all be in memory."""
    paths = [str(path) for path in data[0].rglob("*.jpg")][:4] * 25
    read, load_image = [], single_images.load_image
    monkeypatch.setattr(
        single_images, "load_image", lambda path, trained: read.append(path) or load_image(path, trained)
    )
    found = predict(run, paths, device="cpu", batch_size=4, progress=False)
    for i in range(1, 30):
        next(found)
        if i == 1:
            time.sleep(0.5)  # time to read ahead as far as ever
        assert len(read) <= 4 * ((i - 1) // 4 + 3)
    found.close()
    assert len(read) < 60


def test_a_progress_bar_tells_how_many_of_how_many_and_how_fast(run, data, capsys):
    assert main(command(run, data[0], "--batch-size", "2")) == 0
    told = capsys.readouterr().err
    assert "/12 [" in told
    assert re.search(r"images/s|s/ images", told)
    assert main(command(run, data[0], "--batch-size", "2", "--quiet")) == 0
    assert capsys.readouterr().err == ""


def test_pictures_of_a_folder_lie_as_its_images(run, mixed, tmp_path, capsys, monkeypatch):
    (mixed / "class0" / "img000.png").write_bytes(encoded(picture(9), "PNG"))
    out = tmp_path / "maps"
    assert main(command(run, mixed, "--map", "--out", out)) == 3
    drawn = {str(path.relative_to(out)) for path in out.rglob("*.png")}
    good = {key for key in find_images(mixed).keys if key not in BAD}
    assert len(drawn) == len(good)
    assert {"class0/img000.map.png", "class0/img000-2.map.png", "class0.map.png", "class2/img002.map.png"} <= drawn
    capsys.readouterr()
    monkeypatch.chdir(mixed)  # the usual folder for pictures would lie among the images
    assert main(command(run, ".", "--map")) == 2
    told = capsys.readouterr()
    assert "pictures would be written among the images" in told.err
    assert not (mixed / "predictions").exists()
