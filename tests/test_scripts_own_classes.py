"""The comparison of ways to teach one's own classes: its commands are ones that exist, and its table adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labeler.__main__ import parser_of
from scripts import own_classes
from train.recipes.recipe import load_recipe

ACCURACY = {"image-labels-only": (0.10, 0.12), "the-teacher-s-classes": (0.15, 0.19)}


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that were run; students have the accuracies above, or 20 %."""
    ran = []

    def command(name: str, *arguments: object) -> dict:
        line = [name, *map(str, arguments)]
        ran.append(line)
        if name == "label":
            return {"agreement": None if "--fit-head" not in line else 0.75, "bytes_per_image": 200.4}
        (out,) = [Path(one.split("=", 1)[1]).name for one in line if one.startswith("run.out=")]
        arm, _, seed = out.rpartition("-")
        return {"top1": ACCURACY[arm][int(seed)] if arm in ACCURACY else 0.2}

    monkeypatch.setattr(own_classes, "command", command)
    return ran


def test_every_way_is_taught_from_its_own_labels_with_every_seed(commands, tmp_path, capsys):
    teachers = ["--teacher", "resnet18=a.safetensors", "--teacher", "resnet34=b.safetensors"]
    data = ["--images", str(tmp_path / "train"), "--validation", str(tmp_path / "val")]
    assert own_classes.main([*data, *teachers, "--out", str(tmp_path), "--seeds", "0", "1"]) == 0
    stores = [line[line.index("--store") + 1] for line in commands if line[0] == "label"]
    students = [line for line in commands if line[0] == "fit" and line[1] == "cifar10_nano"]
    assert len(set(stores)) == 4
    assert len(students) == 2 * 5
    for line in students:
        settings = [one for one in line[2:] if "=" in one]
        recipe = load_recipe(line[1], settings)
        assert recipe.run.threads == 1
        plain = recipe.data.store is None
        assert plain == (recipe.loss.dense_weight == 0)
        assert plain or str(recipe.data.store) in stores
    for line in commands:
        if line[0] == "label":
            parser_of("label").parse_args(line[1:])
    rows = {line[:40].strip(): line[40:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["image labels only"] == ["–", "–", "11.0%", "±", "1.0%", "–"]
    assert rows["the teacher's classes"] == ["–", "200", "17.0%", "±", "2.0%", "+6.0%", "±", "1.0%"]
    assert rows["fitted head, resnet34"][:2] == ["75.0%", "200"]
    assert json.loads((tmp_path / "results.json").read_text())["students"]["image labels only"] == [0.10, 0.12]


def test_a_command_that_fails_ends_it(tmp_path):
    with pytest.raises(SystemExit, match="`token-labeling label` failed with status 2"):
        own_classes.command("label", tmp_path / "nothing", "--store", tmp_path / "labels", "--teacher", "resnet18")
