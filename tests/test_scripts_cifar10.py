"""The CIFAR-10 experiment on a few drawn pictures: every part runs, what is done is kept, and the arms differ."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.cifar10 import CLASSES, main, unpack
from train.recipes.recipe import load_recipe
from train.record.continuation import differences

SMALL = ["model.args.depth=1", "model.args.embed_dim=16", "data.backend=pil", "run.threads=1", "run.batch_size=8"]
SMALL += ["schedule.warmup_epochs=0"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("cifar") / "few.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, count in (("train", 3), ("test", 1)):
            for name in CLASSES:
                for i in range(count):
                    picture = io.BytesIO()
                    Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(picture, "JPEG")
                    file.writestr(f"{split}/{name}/{i:04}.jpg", picture.getvalue())
    return path


def content(folder: Path) -> dict[str, int]:
    found = {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    return {name: changed for name, changed in found.items() if name.endswith((".jpg", ".safetensors"))}


def test_the_experiment_trains_three_students_and_keeps_what_is_done(archive, tmp_path, capsys):
    arguments = ["--data", str(archive), "--out", str(tmp_path), "--teacher-steps", "2", "--set", *SMALL]
    assert main([*arguments, "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["labels"]["rows"] == 30
    assert [run["arm"] for run in results["runs"]] == ["image-label-only", "image-label-on-every-token", "token-labels"]
    for run in results["runs"]:
        assert run["steps"] == 2
        row = next(line for line in printed.splitlines() if line.startswith(run["arm"].replace("-", " ") + "  "))
        assert f"{run['top1']:.2%}" in row
    configs = [load_recipe(tmp_path / f"{run['arm']}-0" / "config.toml") for run in results["runs"]]
    assert set(differences(configs[1], configs[2])) == {"data.token_labels"}
    assert set(differences(configs[0], configs[1])) == {"loss.dense_weight"}

    before = content(tmp_path)
    assert main([*arguments, "--steps", "2"]) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert content(tmp_path) == before
    with pytest.raises(SystemExit, match="2"):  # the runs there are of two steps
        main([*arguments, "--steps", "3"])


def test_an_archive_of_other_images_is_refused(archive, tmp_path, capsys):
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("train/cat/0.jpg", b"")
    for path, message in ((other, "is not an archive of CIFAR-10"), (tmp_path / "none.zip", "cannot be unpacked")):
        with pytest.raises(SystemExit, match="2"):
            main(["--data", str(path), "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
    unpack(archive, tmp_path / "images")
    (tmp_path / "images" / "source.json").write_text("{}")
    with pytest.raises(Exception, match="contains other images"):
        unpack(archive, tmp_path / "images")
