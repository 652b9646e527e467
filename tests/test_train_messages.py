"""What a user is told in plain words: nothing twice, nothing of the system's own, nothing that does not apply."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from tiny_runs import tiny_config, tiny_data

from labeler.base.errors import InputError, ModelError, error_text
from train import fit
from train.__main__ import main
from train.evaluation.validate import load_trained
from train.network import build_network
from train.record.checkpoint_folders import checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(tiny_config(*data, out, **{"schedule.steps": 1}))
    return out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("kind", [InputError, ModelError])
def test_an_error_inside_of_another_says_once_what_was_got(kind):
    inner = ModelError("there is no such file", got="x.pth", expected="a file")
    assert str(kind("it cannot be read", got=inner)) == (
        "it cannot be read: there is no such file: got x.pth, expected a file"
    )
    assert str(kind("it cannot be read", got="x")) == "it cannot be read: got x"


def test_refusals_of_models_and_files_have_got_once(data, run, tmp_path, capsys):
    image = next(data[0].rglob("*.*g"))
    (tmp_path / "text.pth").write_text("hello")
    for arguments in (
        ("validate", tmp_path / "none.pth", "--images", data[0]),
        ("predict", tmp_path / "text.pth", image),
        ("fit", "demo", f"images={data[0]}", f"store={data[1]}", f"model.weights={tmp_path / 'none.pth'}"),
        ("fit", "demo", f"images={data[0]}", f"store={data[1]}", "img_size=33", f"run.out={tmp_path / 'run'}"),
    ):
        assert refusal(capsys, *arguments).count("got ") == 1


def test_a_folder_in_place_of_a_file_is_called_one(data, run, tmp_path, capsys):
    error = refusal(capsys, "validate", run, "--images", data[0], "--device", "cpu", "--real", tmp_path)
    assert "is a folder" in error
    assert "Is a directory" not in error
    assert "Errno" not in error
    with pytest.raises(OSError, match="Errno") as caught:
        (tmp_path / "none").read_bytes()
    assert error_text(caught.value) == f"No such file or directory: {str(tmp_path / 'none')!r}"


def test_a_pipe_that_is_closed_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "train", "recipes"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_new_heads_are_told_only_where_trained_ones_are_lost(data, tmp_path, caplog):
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "seven.pth")
    settings = {"model.name": "test_resnet", "model.img_size": 64, "model.args": {}, "schedule.steps": 1}
    with caplog.at_level("INFO", "train"):
        fit(tiny_config(*data, tmp_path / "fresh", **settings))
        assert "new heads" not in caplog.text
        fit(tiny_config(*data, tmp_path / "begun", **settings, **{"model.weights": str(tmp_path / "seven.pth")}))
    assert "new heads for 6 classes replace trained ones for 7" in caplog.text


def test_missing_averages_name_the_settings_that_asked_for_them(data, run, tmp_path):
    with pytest.raises(InputError, match=r"no averaged weights.*Use its plain weights, without `ema` or"):
        load_trained(run, ema=True)
    settings = {"model.weights": str(checkpoints(run)[0]), "model.weights_ema": True}
    with pytest.raises(InputError, match=r"without `ema` or model\.weights_ema"):
        build_network(tiny_config(*data, tmp_path / "next", **settings).model)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_writes_into_the_folder_of_the_run(data, tmp_path, monkeypatch, name):
    given: list[dict] = []
    tracker = SimpleNamespace(init=lambda **told: given.append(told), log=lambda row: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, name, tracker)
    fit(tiny_config(*data, tmp_path / "run", **{"run.tracker": name, "schedule.steps": 1}))
    assert given[0].get("dir") == (str(tmp_path / "run") if name == "wandb" else None)
    assert (given[0]["name"], given[0]["config"]["schedule.steps"]) == ("run", 1)


def test_another_model_is_told_how_to_take_a_recipes_arguments_back(data, tmp_path, capsys):
    """Whoever changes model.name alone keeps the patch size and width of the recipe's own model."""
    ours = (f"data.images={data[0]}", "data.store=none", "data.token_labels=false", f"run.out={tmp_path / 'run'}")
    error = refusal(capsys, "fit", "demo", *ours, "model.name=test_resnet")
    assert "got patch_size, which it does not accept" in error
    assert "model.args sets patch_size, embed_dim, depth, d_state, expand; model.args={} unsets all of them." in error
    assert error.count("got ") == 1
    shorter = ("model.args={}", "steps=1", "warmup_epochs=0", "batch_size=4", "device=cpu", "data.validation=none")
    assert main(["fit", "demo", *ours, "model.name=test_resnet", *shorter, "--quiet"]) == 0
    other = ("model.name=inception_v3", "model.args={}", "drop_path_rate=0.1", f"run.out={tmp_path / 'other'}")
    error = refusal(capsys, "fit", "demo", *ours, *other)
    assert "got drop_path_rate, which it does not accept. Set model.drop_path_rate=0." in error
