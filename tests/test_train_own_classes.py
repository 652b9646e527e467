"""Runs whose class head has the images' own classes, and whose token head has those of the labels' teacher."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from tiny import CLASSES, make_images
from tiny_runs import FULL, outcome, tiny_config, tiny_data

from labeler import InputError, LabelerConfig, MismatchError, TeacherConfig, create_teacher, label_images
from model import token_label
from pipeline import LoaderConfig, create_loader
from train import TokenLabelLoss, TrainConfig, fit
from train.errors import Stopped
from train.evaluation.predict import predict
from train.evaluation.validate import load_trained, validate
from train.network import build_network, set_classes
from train.ranks.distributed import Ranks
from train.record.checkpoint import check_checkpoint, read_weights
from train.record.checkpoint_folders import checkpoints
from train.trainer import Trainer

OWN = 4
NAMES = [f"class{i}" for i in range(OWN)]
RESNET = {"model.name": "test_resnet", "model.args": {}, "model.img_size": 64, "augment.mix": "image"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four class folders, and labels of a teacher of six other classes."""
    folder = tmp_path_factory.mktemp("data")
    images, store = make_images(folder / "images", 12, OWN), folder / "labels"
    teacher = TeacherConfig("tiny:colour_teacher")
    label_images(images, store, LabelerConfig(teacher, shard_size=4, decoder="pil", threads=1, progress=False))
    return images, store


def config_of(data: tuple[Path, Path], out: Path, **overrides: Any) -> TrainConfig:
    return tiny_config(*data, out, **{**FULL, "data.validation": str(data[0]), **overrides})


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(config_of(data, out))
    return out


def test_a_run_says_and_records_whose_classes_its_heads_have(data, tmp_path, caplog):
    caplog.set_level(logging.INFO, "train")
    fit(config_of(data, tmp_path / "run", **{"schedule.steps": 3}))
    assert "4×4 tokens, 4 classes of the images, 6 of the teacher for the tokens" in caplog.text
    info = check_checkpoint(checkpoints(tmp_path / "run")[0])
    assert (info.classes, info.num_classes, info.aux_classes) == ("images", OWN, CLASSES)
    assert (info.class_names, info.class_folders) == (NAMES, {name: i for i, name in enumerate(NAMES)})
    caplog.clear()
    fit(tiny_config(*tiny_data(tmp_path / "known"), tmp_path / "other", **{"schedule.steps": 1}))
    assert "6 classes of the teacher" in caplog.text
    info = check_checkpoint(checkpoints(tmp_path / "other")[0])
    assert (info.classes, info.num_classes, info.aux_classes) == ("teacher", CLASSES, None)


@pytest.mark.parametrize("averaged", [False, True])
def test_an_evaluation_is_of_the_class_head_alone_and_by_the_images_classes(run, data, averaged):
    trained = load_trained(run, averaged)
    settings = LoaderConfig(
        str(data[0]), train=False, batch_size=12, image_size=32, grid=(4, 4), crop_pct=0.9, interpolation="bicubic",
        device="cpu", threads=1, backend="pil",
    )  # fmt: skip
    [batch] = create_loader(settings)
    with torch.no_grad():
        features = trained.net.forward_features(batch.images)
        predicted = trained.net.head(trained.net.pool(features)).argmax(1)
    result = validate(run, data[0], ema=averaged, backend="pil", device="cpu", progress=False)
    assert result.top1 == pytest.approx(float((predicted == batch.labels).double().mean()))
    assert sorted(one.name for one in result.per_class) == NAMES
    wrong = sum(confusion.images for confusion in result.confusions)
    assert wrong == int((predicted != batch.labels).sum())


def test_a_stopped_run_resumes_bit_for_bit(data, tmp_path):
    fit(config_of(data, tmp_path / "undisturbed"))
    config = config_of(data, tmp_path / "run")
    trainer = Trainer(config, Ranks(0, 1, torch.device("cpu")))
    step = trainer.train_step.run
    trainer.train_step.run = lambda batch, done, stop: step(batch, done, lambda: done == 4)  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="after step 5"):
        trainer.run()
    fit(config, resume="auto")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


def test_a_run_goes_on_with_the_classes_that_it_began_with(run, data, tmp_path):
    for kind, got in (("teacher", "6 of the teacher"), ("auto", None), ("images", None)):
        config = config_of(data, tmp_path / kind, **{"data.classes": kind, "data.validation": None})
        if got is None:
            assert fit(config, resume=run).steps == 9
        else:
            with pytest.raises(MismatchError, match=rf"other classes: got {got}, expected 4 of the images"):
                fit(config, resume=run)


def test_both_heads_learn(run, data):
    """From one checkpoint to a later one the weights of both change, and the tokens' have the teacher's shape."""
    first, last = checkpoints(run)[-1], checkpoints(run)[0]
    one, other = (read_weights(folder, check_checkpoint(folder)) for folder in (first, last))
    assert other["head.weight"].shape == (OWN, 16)
    assert other["aux_head.weight"].shape == (CLASSES, 16)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert not torch.equal(one["aux_head.weight"], other["aux_head.weight"])


def test_a_class_folder_that_only_validation_has_is_refused_by_name(data, tmp_path):
    validation = make_images(tmp_path / "val", 10, OWN + 1)
    config = config_of(data, tmp_path / "run", **{"data.validation": str(validation)})
    with pytest.raises(InputError, match=r"data.validation: .*2 images.*not among the classes: 'class4'"):
        fit(config)


def test_an_evaluation_of_some_of_the_classes_keeps_their_ids(run, tmp_path):
    make_images(tmp_path / "val", 3, 1)
    (tmp_path / "val" / "class0").rename(tmp_path / "val" / "class3")
    result = validate(run, tmp_path / "val", backend="pil", device="cpu", progress=False)
    assert [one.name for one in result.per_class] == ["class3"]


def test_the_teachers_classes_on_both_heads_are_had_by_asking(data, tmp_path):
    config = config_of(data, tmp_path / "run", **{"data.classes": "teacher", "data.validation": None})
    fit(config)
    assert load_trained(tmp_path / "run").net.num_classes == CLASSES
    with pytest.raises(InputError, match='use classes="images"'):
        fit(config_of(data, tmp_path / "other", **{"data.classes": "teacher"}))


def test_a_loss_that_blends_true_classes_into_the_teachers_is_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"ground_truth blends .* Set ground_truth=false"):
        fit(config_of(data, tmp_path / "run", **{"loss.ground_truth": True}))


def test_predictions_have_the_folders_names_and_maps_the_teachers(run, data, tmp_path):
    image = next(data[0].rglob("*.jpg"))
    [found] = predict(run, [image], maps=tmp_path / "maps", device="cpu", progress=False)
    assert sorted(share.name for share in found.classes) == NAMES
    assert Image.open(str(found.map)).size[0] > 32
    trained = load_trained(run)
    assert [trained.aux_class_name(i) for i in range(CLASSES)] == [f"class {i}" for i in range(CLASSES)]
    named = replace(trained, aux_class_names=("red", "green"))
    assert (named.aux_class_name(1), named.class_name(1)) == ("green", "class1")


@pytest.mark.parametrize("model", [{}, RESNET], ids=["ours", "timm's"])
def test_timm_reads_what_a_run_leaves_with_the_names_of_the_class_head(data, tmp_path, model):
    fit(config_of(data, tmp_path / "run", **{"ema.decay": None, "schedule.steps": 3, **model}))
    trained = load_trained(tmp_path / "run")
    read = timm.create_model(f"local-dir:{tmp_path / 'run' / 'timm'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, trained.side, trained.side)
    torch.testing.assert_close(read(pixels), trained.net(pixels))
    assert read.pretrained_cfg["label_names"] == NAMES


def test_a_run_of_own_classes_as_a_teacher_gives_the_classes_of_its_token_head_no_wrong_names(run):
    """Its maps are those of the token head, whose classes are not the ones that its folder names."""
    teacher = create_teacher(TeacherConfig(str(run)))
    assert (teacher.info.num_classes, teacher.class_names) == (CLASSES, ())


def test_a_trained_token_head_stays_where_the_class_head_is_replaced(tmp_path):
    """From a run on the teacher's classes to one on the images' own, with labels of the same teacher."""
    images, store = tiny_data(tmp_path / "data")
    fit(tiny_config(images, store, tmp_path / "run"))
    config = tiny_config(images, store, tmp_path / "next", **{"model.weights": str(tmp_path / "run")}).model
    net = build_network(config)
    before = net.aux_head.weight.clone()
    set_classes(net, OWN, CLASSES, config)
    assert net.head.weight.shape == (OWN, 16)
    assert torch.equal(net.aux_head.weight, before)
    set_classes(net, OWN, 9, config)
    assert net.aux_head.weight.shape == (9, 16)


def test_weights_of_a_run_of_own_classes_begin_another(run, data, tmp_path):
    config = config_of(data, tmp_path / "next", **{"model.weights": str(run), "model.img_size": 40})
    net = build_network(config.model)
    weights = read_weights(checkpoints(run, "best")[0], check_checkpoint(checkpoints(run, "best")[0]))
    assert torch.equal(net.aux_head.weight, weights["aux_head.weight"])
    assert (net.num_classes, net.aux_classes) == (OWN, CLASSES)
    new = build_network(config.model.model_copy(update={"new_heads": True}))
    assert new.aux_head.weight.shape == (CLASSES, 16)
    assert not torch.equal(new.aux_head.weight, weights["aux_head.weight"])


def test_a_loop_of_ones_own_trains_both_heads(data):
    config = LoaderConfig(
        str(data[0]), str(data[1]), classes="images", batch_size=4, image_size=32, grid=(4, 4), mix="token",
        mix_prob=0.5, scale=(0.8, 1.0), device="cpu", threads=1, backend="pil",
    )  # fmt: skip
    loader = create_loader(config)
    torch.manual_seed(0)
    net = token_label(
        "demansia_nano", loader.num_classes, aux_classes=loader.aux_classes, img_size=32, patch_size=8, embed_dim=16,
        depth=1,
    )  # fmt: skip
    criterion, optimizer = TokenLabelLoss(classes="images"), torch.optim.AdamW(net.parameters(), 1e-2)
    alone = [TokenLabelLoss(classes="images", **{name: 0.0}) for name in ("dense_weight", "cls_weight")]
    [images] = create_loader(replace(config, train=False, mix="none", batch_size=12))

    def losses() -> list[float]:
        """Of each head, on all images."""
        with torch.no_grad():
            outputs = net(images.images)
        return [one(outputs, images).item() for one in alone]

    before = losses()
    for _ in range(25):
        for batch in loader:
            loss = criterion(net(batch.images, mix=batch.token_mix), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(after < 0.9 * first for first, after in zip(before, losses(), strict=True))
