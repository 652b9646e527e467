"""docs/recipes.md says what a run leaves, and its code takes the weights to timm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny_config, tiny_data

from train import fit
from train.evaluation.validate import load_trained

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def section(heading: str) -> str:
    return PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left")
    images, store = tiny_data(folder)
    settings = {
        "model.name": "test_resnet",
        "model.img_size": 64,
        "model.args": {},
        "data.validation": str(images),
        "ema.decay": 0.5,
        "run.tensorboard": True,
        "schedule.steps": 4,
    }
    fit(tiny_config(images, store, folder / "runs" / "resnet50", **settings))
    return folder / "runs" / "resnet50"


def test_every_file_of_a_run_is_explained_and_each_one_explained_is_there(run):
    told = set(re.findall(r"^\| `([^`…]+)…?`", section("What a run leaves"), re.M))
    left = {path.name for path in run.iterdir()} - {"checkpoints"}
    left |= {f"checkpoints/{path.name.split('-')[0]}-" for path in (run / "checkpoints").iterdir()}
    assert told == {f"{name}/" if (run / name).is_dir() else name for name in left}


def test_columns_that_the_page_names_are_in_the_table(run):
    (line,) = (line for line in section("What a run leaves").splitlines() if "`metrics.csv`" in line)
    named = re.findall(r"`((?:train|eval)_\w+)`", line)
    assert len(named) == 5
    assert set(named) <= set((run / "metrics.csv").read_text().splitlines()[0].split(","))


def test_a_backbone_of_timms_goes_back_to_timm(run, monkeypatch, capsys):
    part = section("Taking the weights to timm")
    (block,) = re.findall(r"```python\n(.*?)```", part, re.S)
    monkeypatch.chdir(run.parents[1])
    names: dict[str, Any] = {}
    exec(block, names)
    assert capsys.readouterr().out.startswith("['")
    trained, plain = load_trained(run), names["net"].eval()
    assert len(plain.state_dict()) == len(trained.net.backbone.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert not torch.allclose(plain(images), trained.net(images))
        trained.net.aux_weight = 0.0
        torch.testing.assert_close(plain(images), trained.net(images))
