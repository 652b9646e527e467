"""A teacher of one's own in two commands: trained with `fit`, found by its run's folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import hub_server
from tiny_runs import tiny_config, tiny_data

import train
from labeler import IntegrityError, LabelerConfig, LabelStore, TeacherConfig, TeacherError, create_teacher, label_images
from labeler.store.check_store import check_store
from train.evaluation.validate import load_trained
from train.recipes.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PLAIN = {"data.token_labels": False, "loss.dense_weight": 0.0, "augment.mix": "none", "data.backend": "pil"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data"))[0]


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of timm's test_resnet on six class folders, without any label store."""
    folder = tmp_path_factory.mktemp("run") / "teacher"
    model = {"model.name": "test_resnet", "model.args": {}, "model.img_size": 64}
    train.fit(tiny_config(images, None, folder, **PLAIN, **model, **{"data.validation": str(images)}))
    return folder


def test_a_run_leaves_a_folder_that_timm_reads(run):
    trained = load_trained(run)
    model = timm.create_model(f"local-dir:{run / 'timm'}", pretrained=True).eval()
    pixels = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(pixels), trained.net.backbone.eval()(pixels))
    assert tuple(model.pretrained_cfg["mean"]) == tuple(trained.transform["mean"])
    assert model.pretrained_cfg["label_names"] == sorted(trained.class_folders)


@pytest.mark.parametrize("way", ["run", "local-dir"])
def test_a_run_is_a_teacher_with_its_own_classes(run, images, tmp_path, way):
    name = str(run) if way == "run" else f"local-dir:{run / 'timm'}"
    config = LabelerConfig(TeacherConfig(name), decoder="pil", threads=1, progress=False)
    summary = label_images(images, tmp_path / "labels", config)
    assert summary.rows == 12
    assert summary.agreement is not None
    store = LabelStore(tmp_path / "labels")
    assert list(store.meta.class_names) == sorted(path.name for path in images.iterdir())
    assert not check_store(tmp_path / "labels").problems


def test_a_network_of_the_hub_is_a_teacher_with_its_own_classes(run, images, tmp_path):
    """Fetched by `huggingface_hub` over HTTP: the labels are those of the folder that was uploaded."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra: hf)")
    with hub_server() as hub:
        hub.repos["user/net"] = {path.name: path.read_bytes() for path in (run / "timm").iterdir()}
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}

        def label(store: str, teacher: str) -> subprocess.CompletedProcess[str]:
            command = ["label", str(images), "--store", str(tmp_path / store), "--teacher", teacher, "--quiet"]
            return subprocess.run(
                [sys.executable, "-m", "labeler", *command, "--decoder", "pil", "--threads", "1"],
                env=os.environ | variables, capture_output=True, text=True, cwd=ROOT,
            )  # fmt: skip

        for store, teacher in (("hub", "hf-hub:user/net"), ("local", f"local-dir:{run / 'timm'}")):
            done = label(store, teacher)
            assert done.returncode == 0, done.stderr
        absent = label("none", "hf-hub:user/none")
    hub_labels, local = LabelStore(tmp_path / "hub"), LabelStore(tmp_path / "local")
    assert list(hub_labels.meta.class_names) == sorted(path.name for path in images.iterdir())
    assert hub_labels.read(range(12)).scores.tolist() == local.read(range(12)).scores.tolist()
    assert absent.returncode == 2
    assert "hf-hub:user/none" in absent.stderr.splitlines()[-1]


def test_images_of_some_of_the_classes_are_labeled_under_the_teachers_names(run, images, tmp_path):
    """The number of folders does not give the classes away: the names that come with the weights do."""
    some = tmp_path / "some"
    names = sorted(path.name for path in images.iterdir())
    for name in names[2:4]:
        shutil.copytree(images / name, some / name)
    config = LabelerConfig(TeacherConfig(str(run)), decoder="pil", threads=1, progress=False)
    label_images(some, tmp_path / "labels", config)
    store = LabelStore(tmp_path / "labels")
    assert list(store.meta.class_names) == names
    assert set(store.column("target").tolist()) == {2, 3}


def test_a_model_of_ours_is_a_teacher_without_an_import(images, tmp_path):
    """Its name is registered with timm by the package's entry point; its own `score_maps` gives the map."""
    train.fit(tiny_config(images, None, tmp_path / "run", **{**PLAIN, "loss.dense_weight": 1.0}))
    teacher = create_teacher(TeacherConfig(str(tmp_path / "run")))
    assert (teacher.info.num_classes, teacher.info.grid, teacher.info.input_size) == (6, (4, 4), 32)


def test_a_name_of_ours_is_a_teacher_in_a_process_that_has_not_imported_it():
    code = """
import sys
from labeler.config import TeacherConfig
from labeler.teacher.create_teacher import create_teacher
assert "model" not in sys.modules
teacher = create_teacher(TeacherConfig("lvvit_t", random_weights=True, input_size=64))
print(teacher.info.grid, teacher.info.num_classes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(4, 4) 1000"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(TeacherError):
        create_teacher(TeacherConfig(str(tmp_path)))
    with pytest.raises(TeacherError):
        create_teacher(TeacherConfig(f"local-dir:{tmp_path}"))


def test_no_store_is_one_switch_to_plain_classification():
    plain = load_recipe("demansia_tiny", ["data.store=none"])
    assert (plain.data.store, plain.data.token_labels, plain.loss.dense_weight) == (None, False, 0.0)
    control = load_recipe("demansia_tiny", ["data.store=none", "dense_weight=0.5"])
    assert (control.data.token_labels, control.loss.dense_weight) == (False, 0.5)
    assert load_recipe("demansia_tiny").loss.dense_weight == 1.0


def test_the_packaged_teacher_trains_without_labels():
    config = load_recipe("teacher")
    assert (config.data.store, config.data.token_labels, config.loss.dense_weight) == (None, False, 0.0)
    assert json.loads(json.dumps(config.model.args)) == {"pretrained": True}


def test_a_run_does_not_fail_where_no_folder_for_timm_can_be_left(images, tmp_path, monkeypatch, caplog):
    def damaged(run: Path) -> None:
        raise IntegrityError(f"all checkpoints below {run} are damaged")

    monkeypatch.setattr("train.record.timm_folder.load_trained", damaged)
    summary = train.fit(tiny_config(images, None, tmp_path / "run", **PLAIN))
    assert summary.steps == 6
    assert (tmp_path / "run" / "summary.json").is_file()
    assert not (tmp_path / "run" / "timm").exists()
    assert "no folder for timm is left" in caplog.text
