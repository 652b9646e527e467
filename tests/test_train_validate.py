"""`validate`: exact accuracies, ReaL labels, published files, and one line for what cannot be used.

Legend: C classes.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fixtures import state, tensors
from test_model_checkpoints import Canary, lightning, saved
from tiny import CLASSES, encoded, make_images, picture
from tiny_runs import tiny_config, tiny_data

import train
from labeler import TeacherConfig, label_images
from labeler.base.errors import InputError
from labeler.sources.class_names import imagenet_names
from model.backbones.demansia import DeMansia
from train.__main__ import main
from train.evaluation.single_images import load_image, normalized
from train.evaluation.validate import Trained, load_trained, validate
from train.network import build_network
from train.record.metrics import read_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"), 13)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """Learnt well enough for some answers to be right, and some wrong."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.fit(tiny_config(*data, out, **{"ema.decay": 0.5, "optimizer.lr": 0.01, "schedule.steps": 12}))
    return out


def first_five(trained: Trained, path: Path) -> list[int]:
    """The answer to one image alone."""
    with torch.inference_mode():
        return (
            trained.net(normalized([load_image(path, trained)], trained))[0]
            .topk(min(5, trained.net.num_classes))
            .indices.tolist()
        )


def checked(checkpoint: Path, images: Path, right: dict[str, set[int]], **settings: Any) -> tuple[float, float, int]:
    """What `validate` found, after a comparison with a plain loop; right: file name -> classes, empty where unknown."""
    trained = load_trained(checkpoint, settings.get("ema", False))
    paths = [path for path in sorted(images.rglob("*.*")) if right[path.name]]
    answers = [first_five(trained, path) for path in paths]
    found = validate(checkpoint, images, backend="pil", device="cpu", progress=False, **settings)
    first = sum(answer[0] in right[path.name] for answer, path in zip(answers, paths, strict=True))
    five = sum(bool(right[path.name] & set(answer)) for answer, path in zip(answers, paths, strict=True))
    assert found.images == len(paths)
    assert found.top1 == first / len(paths)
    assert found.top5 == five / len(paths)
    return found.top1, found.top5, found.images


def folders(images: Path, ids: dict[str, int]) -> dict[str, set[int]]:
    return {path.name: {ids[path.parent.name]} for path in images.rglob("*.*")}


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_accuracies_are_those_of_a_plain_loop(run, data, batch_size, ema):
    """13 images: the last batch of five has three."""
    ids = {f"class{i}": i for i in range(CLASSES)}
    top1, top5, _ = checked(run, data[0], folders(data[0], ids), batch_size=batch_size, ema=ema)
    if not ema:
        assert 0 < top1 < 1
        assert top1 < top5


def test_folders_mean_what_they_meant_in_training(run, data, tmp_path):
    """Only some of the folders, so that their order alone would name other classes."""
    images = tmp_path / "some"
    for name in ("class2", "class5"):
        shutil.copytree(data[0] / name, images / name)
    ids = {"class2": 2, "class5": 5}
    checked(run, images, folders(images, ids))


@pytest.fixture(scope="module")
def real_labels() -> list[list[int]]:
    return [[0, 3], [], [5], [1, 2, 4], [3], [0], [2], [4, 5]]


@pytest.mark.parametrize("flat", [True, False])
def test_real_labels_count_wherever_the_images_lie(run, tmp_path, real_labels, flat):
    """Several right classes, and none for the second image; nothing is read from the folders, whatever their names."""
    images, right = tmp_path / "val", {}
    for i, classes in enumerate(real_labels):
        folder = images if flat else images / f"n{i % 3:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
        (folder / name).write_bytes(encoded(picture(100 + i)))
        right[name] = set(classes)
    path = tmp_path / "real.json"
    path.write_text(json.dumps(real_labels))
    _, _, images_counted = checked(run, images, right, real=path, batch_size=3)
    assert images_counted == 7


def test_real_labels_count_for_images_in_tar_shards(run, tmp_path, real_labels):
    images, shards = tmp_path / "val", tmp_path / "shards"
    shards.mkdir()
    for i in range(len(real_labels)):
        folder = images / f"class{i % 6}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG").write_bytes(encoded(picture(100 + i)))
    with tarfile.open(shards / "part-000.tar", "w") as archive:
        for path in sorted(images.rglob("*.JPEG")):
            archive.add(path, str(path.relative_to(images)))
    (tmp_path / "real.json").write_text(json.dumps(real_labels))
    found = [
        validate(str(run), str(place), real=str(tmp_path / "real.json"), device="cpu", progress=False)
        for place in (images, shards, shards / "part-000.tar")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0].images == 7


def test_real_labels_that_fit_nothing_are_refused(run, data, tmp_path, capsys):
    path = tmp_path / "real.json"
    cases = {"[[0], [1]]": "no image to evaluate", "[[0], [6]]": "lists of classes below 6", "{}": "list of lists"}
    cases |= {"[[0": "not a file of ReaL labels", "[[true]]": "list of lists"}
    for content, expected in cases.items():
        path.write_text(content)
        assert expected in refusal(capsys, 2, run, data[0], "--real", path)


def test_a_published_file_is_validated(tmp_path, capsys):
    """Lightning's file of DeMansia as it was published, by the command line."""
    found = tensors("demansia_micro")
    path = saved(tmp_path / "DeMansia.ckpt", lightning(state(found)))
    images = make_images(tmp_path / "images", 23, 10)
    _, top5, _ = checked(path, images, folders(images, {f"class{i}": i for i in range(10)}), batch_size=10)
    command = ["validate", str(path), "--images", str(images), "--json", "--quiet", "--backend", "pil"]
    assert main([*command, "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 23
    assert told["top5"] == top5
    assert load_trained(path).dense_trained
    assert load_trained(path).class_name(3) == "class 3"  # ImageNet's names belong to 1,000 classes, and to no ten


def test_a_published_file_of_imagenet_knows_its_folders_and_names(tmp_path):
    """Three of the 1,000 folders: their WordNet ids tell the classes."""
    torch.manual_seed(0)
    net = DeMansia(img_size=32, embed_dim=8, depth=1)
    path = saved(tmp_path / "net.pth", net.state_dict())
    synsets, names = imagenet_names()
    ids = {synsets[i]: i for i in (3, 500, 999)}
    images = tmp_path / "images"
    trained = load_trained(path)
    for i, name in enumerate(ids):
        (images / name).mkdir(parents=True)
        (images / name / f"{i}.png").write_bytes(encoded(picture(i), "PNG"))
    # One answer is made right, so that not all are wrong.
    net.head.bias.data[500] += 10
    saved(path, net.state_dict())
    assert checked(path, images, folders(images, ids))[0] == 1 / 3
    assert trained.class_name(500) == names[500]


def test_imagenets_folders_are_known_also_where_training_had_only_a_part_of_them(tmp_path, config):
    """A run on three of the 1,000 classes, evaluated on two of which one is new."""
    synsets, _ = imagenet_names()
    images, validation = tmp_path / "images", tmp_path / "validation"
    for root, classes in ((images, (3, 500, 999)), (validation, (500, 7))):
        for c in classes:
            (root / synsets[c]).mkdir(parents=True)
            for i in range(2):
                (root / synsets[c] / f"{c}_{i}.png").write_bytes(encoded(picture(10 * c + i), "PNG"))
    label_images(images, tmp_path / "labels", replace(config, teacher=TeacherConfig("tiny:thousand_classes_teacher")))
    settings = {"data.validation": str(validation), "schedule.steps": 1, "schedule.warmup_epochs": 0}
    train.fit(tiny_config(images, tmp_path / "labels", tmp_path / "run", **settings))
    ids = {name: i for i, name in enumerate(synsets)}
    top1, _, _ = checked(tmp_path / "run", validation, folders(validation, ids))
    assert [row["top1"] for row in read_rows(tmp_path / "run") if "top1" in row] == [top1]


def test_a_stranger_among_imagenets_folders_is_named(tmp_path, capsys):
    torch.manual_seed(0)
    path = saved(tmp_path / "net.pth", DeMansia(img_size=32, embed_dim=8, depth=1).state_dict())
    for name in ("n01440764", "elephant"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "a.jpg").write_bytes(encoded(picture(0)))
    told = refusal(capsys, 2, path, tmp_path / "images")
    assert "not among the classes: 'elephant'" in told
    assert "'n01440764', 'n01443537'" in told


def refusal(capsys: pytest.CaptureFixture[str], status: int, checkpoint: Path, images: Path, *more: object) -> str:
    """The one line of an error."""
    arguments = ["validate", checkpoint, "--images", images, "--quiet", "--device", "cpu", *more]
    assert main([str(argument) for argument in arguments]) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    return told.err


def test_classes_that_the_model_does_not_know_are_named(run, data, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(data[0], images)
    (images / "class2").rename(images / "elephant")
    told = refusal(capsys, 2, run, images)
    assert "1 folder(s) that are not among the classes: 'elephant'" in told
    assert "'class0'" in told
    plain = saved(tmp_path / "net.pth", DeMansia(img_size=32, embed_dim=8, depth=1, num_classes=4).state_dict())
    assert "got 6 folders, expected 4" in refusal(capsys, 2, plain, images)


def test_images_in_no_folder_need_their_classes(run, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.jpg").write_bytes(encoded(picture(0)))
    assert "the true class of 1 images is not known" in refusal(capsys, 2, run, tmp_path / "flat")
    assert "not a folder of images" in refusal(capsys, 2, run, tmp_path / "nothing")


@pytest.mark.parametrize(("precision", "on_a_gpu"), [("float32", torch.float32), ("auto", torch.bfloat16)])
def test_answers_are_computed_as_in_training(data, tmp_path, monkeypatch, precision, on_a_gpu):
    """And without the auxiliary head where it was not part of the loss."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    weight = 0.0 if precision == "auto" else 0.5
    settings = {"schedule.steps": 1, "run.precision": precision, "loss.dense_weight": weight}
    train.fit(tiny_config(*data, tmp_path / "run", **settings))
    trained = load_trained(tmp_path / "run")
    assert trained.dense_trained == (weight > 0)
    assert trained.dtype(torch.device("cuda")) == on_a_gpu
    assert trained.dtype(torch.device("cpu")) == torch.float32


def test_a_damaged_checkpoint_is_refused(run, data, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.rmtree(run / "checkpoints/step-00000009")  # of the epoch before, which would take the damaged one's place
    for name, damage in {
        "weights.safetensors": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        "state.pt": lambda content: content[:100],
        "checkpoint.json": lambda content: content.replace(b'"step": 12', b'"step": 13'),
    }.items():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        folder = copy / "checkpoints/step-00000012"
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(content))
        assert (folder / name).read_bytes() != content
        told = refusal(capsys, 4, folder, data[0])
        assert name in told
        assert "damaged" in told
        assert "all checkpoints" in refusal(capsys, 4, copy, data[0])


def test_what_is_no_checkpoint_is_refused(run, data, tmp_path, capsys):
    (tmp_path / "text.pth").write_text("hello")
    for path, expected in {
        tmp_path / "none": "there is no such checkpoint",
        tmp_path: "there is no checkpoint in",
        tmp_path / "text.pth": "not a file of plain weights",
        saved(tmp_path / "resnet.pth", timm.create_model("test_resnet").state_dict()): "no known family",
    }.items():
        assert expected in refusal(capsys, 2, path, data[0])
    mark = tmp_path / "canary"
    assert "Nothing of it was run" in refusal(capsys, 2, saved(tmp_path / "bad.pth", Canary(mark)), data[0])
    assert not mark.exists()


def test_weights_of_another_model_than_the_record_says_are_refused(run, data, tmp_path, capsys, monkeypatch):
    """As a checkpoint would be that a later version of the project cannot build as it was."""
    from train import network

    real, deeper = network._create, {"patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 4}
    monkeypatch.setattr(network, "_create", lambda c, *more: real(c.model_copy(update={"args": deeper}), *more))
    assert "the checkpoint's weights do not fit its model 'demansia_nano'" in refusal(capsys, 4, run, data[0])


def test_only_square_inputs_are_validated(tmp_path):
    trained = Trained(DeMansia(img_size=(32, 64), embed_dim=8, depth=1), "net", {}, [], {})
    with pytest.raises(InputError, match="32×64"):
        _ = trained.side


@pytest.fixture(scope="module")
def cropped(data, tmp_path_factory) -> Path:
    """A run whose evaluation is not the usual one: whole images, and no auxiliary head."""
    out = tmp_path_factory.mktemp("runs") / "cropped"
    settings = {"augment.crop_pct": 0.5, "model.aux_weight": 0.0, "ema.decay": 0.5, "schedule.steps": 2}
    train.fit(tiny_config(*data, out, **settings))
    return out / "checkpoints/step-00000002"


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors"])
def test_a_file_in_a_checkpoint_is_evaluated_as_its_record_says(cropped, data, name, caplog):
    file, folder = load_trained(cropped / name), load_trained(cropped, ema=name.startswith("ema"))
    assert (file.transform, file.net.aux_weight, file.class_folders) == (folder.transform, 0.0, folder.class_folders)
    assert file.transform["crop_pct"] == 0.5
    for key, value in folder.net.state_dict().items():
        assert torch.equal(file.net.state_dict()[key], value)
    with caplog.at_level("INFO"):
        validate(cropped / name, data[0], backend="pil", device="cpu", progress=False)
    assert "assumed" not in caplog.text
    net = build_network(tiny_config(*data, Path("next"), **{"model.weights": str(cropped / name)}).model)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in folder.net.state_dict().items())


def test_a_file_of_weights_alone_says_what_is_assumed_of_it(cropped, data, tmp_path, caplog):
    alone = Path(shutil.copy(cropped / "weights.safetensors", tmp_path / "alone.safetensors"))
    with caplog.at_level("INFO"):
        validate(alone, data[0], backend="pil", device="cpu", progress=False)
    assert "has no record beside it" in caplog.text
    assert (
        "32×32 pixels, crop_pct 0.9 (center), mean 0.485, 0.456, 0.406, weight of the auxiliary head 0.5" in caplog.text
    )


def test_pixels_and_crop_of_an_evaluation_can_be_chosen(cropped, data, tmp_path, capsys):
    trained = load_trained(cropped, img_size=64, crop_pct=1.0)
    assert (trained.side, trained.transform["crop_pct"]) == (64, 1.0)
    assert load_image(next(data[0].rglob("*.*g")), trained).shape == (64, 64, 3)
    images = ["--images", str(data[0]), "--device", "cpu", "--backend", "pil", "--quiet"]
    assert main(["validate", str(cropped), *images, "--img-size", "64", "--crop-pct", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 13
    assert main(["predict", str(cropped), str(next(data[0].rglob("*.*g"))), "--img-size", "64", "--quiet"]) == 0
    capsys.readouterr()
    assert "crop_pct is out of range: got 1.5" in refusal(capsys, 2, cropped, data[0], "--crop-pct", 1.5)
    assert "cannot take 33×33 pixels: the image does not divide into patches: got 33×33" in refusal(
        capsys, 2, cropped, data[0], "--img-size", 33
    )
