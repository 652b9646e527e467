"""Fine-tuning: from published files and our own checkpoints, to other classes and resolutions, whole or heads only.

Legend: C classes.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fixtures import close, state, tensors
from safetensors.torch import load_file, save_file
from test_model_checkpoints import lightning, saved
from tiny import CLASSES, make_images
from tiny_runs import outcome, tiny_config, tiny_data

import train
from labeler.base.command_line import run_command
from labeler.base.errors import InputError
from model import load_reference_checkpoint
from train.__main__ import main
from train.evaluation.validate import load_trained, validate
from train.network import build_network
from train.recipes.recipe import to_toml
from train.record.checkpoint import check_checkpoint
from train.record.checkpoint_folders import checkpoints

MICRO = {"embed_dim": 32, "depth": 4}  # of the published names in /fixtures, 64² pixels, ten classes
HEADS = ("head.", "aux_head.", "backbone.head.", "backbone.fc.")
# Short names of timm's own, for its tests: a ResNet with BatchNorm, and a ViT.
OTHERS: list[dict[str, Any]] = [
    {"model.name": "test_resnet", "model.img_size": 64},
    {"model.name": "test_vit", "model.img_size": 32, "augment.mix": "token"},
]

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train.fit(tiny_config(*data, out, **{"ema.decay": 0.5, "schedule.steps": 2}))
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A DeMansia as Lightning saves it, under its published names."""
    folder = tmp_path_factory.mktemp("published")
    return saved(folder / "DeMansia.ckpt", lightning(state(tensors("demansia_micro"))))


def last(run: Path) -> State:
    return load_file(checkpoints(run)[0] / "weights.safetensors")


def same(a: State, b: State, but: tuple[str, ...] = ()) -> bool:
    """Whether all tensors are bit for bit equal, those aside whose names begin with `but`."""
    names = {name for name in a if not name.startswith(but or ("\0",))}
    assert names
    assert names == {name for name in b if not name.startswith(but or ("\0",))}
    return all(torch.equal(a[name], b[name]) for name in names)


def test_a_published_file_is_where_training_begins(data, published, tmp_path):
    """Ten classes on 64² pixels become six on 32²: everything but heads and positions is as published."""
    found = state(tensors("demansia_micro"))
    settings = {"model.args": MICRO, "model.weights": str(published)}
    begun = build_network(tiny_config(*data, tmp_path / "a", **settings, **{"model.img_size": 64}).model)
    # Nothing is changed that need not be: the published output, to rounding.
    begun.eval()
    close(begun(tensors("demansia_micro")["x"]), tensors("demansia_micro")["eval.out"], 1e-5)
    config = tiny_config(*data, tmp_path / "run", **settings, **{"schedule.steps": 2, "optimizer.lr": 1e-12,
                         "schedule.kind": "constant", "optimizer.weight_decay": 0.0})  # fmt: skip
    train.fit(config)
    weights, reference = last(tmp_path / "run"), load_reference_checkpoint(published)
    reference.set_input_size(32)
    assert weights["head.weight"].shape == weights["aux_head.weight"].shape == (CLASSES, 32)
    assert weights["pos_embed"].shape == (1, 5, 32)
    resized = reference.pos_embed.detach()
    # Two steps of Adam at a learning rate of 1e-12 move no weight by more than 2e-12, less than float32 tells of most.
    assert (weights["pos_embed"] - resized).abs().max() < 1e-8
    trained = {name for name in found if not name.startswith((*HEADS, "pos_embed")) and "running" not in name}
    trained -= {name for name in found if name.endswith("num_batches_tracked")}
    assert max((weights[name] - found[name]).abs().max() for name in trained) < 1e-8
    assert any(not torch.equal(weights[name], found[name]) for name in found if "running" in name)


def test_a_published_file_is_fine_tuned_to_other_classes_and_pixels(data, published, tmp_path, capsys):
    """By the command line, as a user would; what comes out validates."""
    recipe = tmp_path / "tune.toml"
    recipe.write_text(to_toml(tiny_config(*data, tmp_path / "run")))
    images = make_images(tmp_path / "images", 20, 10)
    before = validate(published, images, backend="pil", device="cpu", progress=False)
    assert before.images == 20
    command = ["fit", str(recipe), f"model.weights={published}", "model.args={embed_dim=32, depth=4}"]
    assert main([*command, "model.img_size=48", "schedule.steps=6", "optimizer.lr=0.003"]) == 0
    info = check_checkpoint(checkpoints(tmp_path / "run")[0])
    assert (info.num_classes, info.model["img_size"]) == (CLASSES, 48)
    trained = load_trained(tmp_path / "run")
    assert (trained.side, trained.net.num_classes) == (48, CLASSES)
    assert validate(tmp_path / "run", data[0], device="cpu", backend="pil", progress=False).images == 12
    assert not same(last(tmp_path / "run"), load_reference_checkpoint(published).state_dict(), (*HEADS, "pos_embed"))


@pytest.mark.parametrize("ema", [False, True])
def test_our_own_checkpoints_begin_a_run_bit_for_bit(data, run, tmp_path, ema):
    settings = {"model.weights": str(run), "model.weights_ema": ema}
    net = build_network(tiny_config(*data, tmp_path / "next", **settings).model)
    wanted = load_file(checkpoints(run)[0] / ("ema.safetensors" if ema else "weights.safetensors"))
    other = load_file(checkpoints(run)[0] / ("weights.safetensors" if ema else "ema.safetensors"))
    assert same(net.state_dict(), wanted)
    assert not same(wanted, other)
    fresh = build_network(tiny_config(*data, tmp_path / "next", **settings, **{"model.new_heads": True}).model)
    assert same(fresh.state_dict(), wanted, HEADS)
    for name in ("head.weight", "aux_head.weight"):
        assert not torch.equal(fresh.state_dict()[name], wanted[name])


@pytest.mark.parametrize("ema", [False, True])
def test_our_own_checkpoints_are_fine_tuned_to_other_classes_and_pixels(run, tmp_path, ema):
    """Six classes on 32² pixels to the three of plain folders on 64²."""
    images = make_images(tmp_path / "images")
    settings = {"model.weights": str(run), "model.weights_ema": ema, "model.img_size": 64, "ema.decay": 0.5}
    summary = train.fit(tiny_config(images, None, tmp_path / "next", **settings, **{"data.validation": str(images)}))
    assert summary.steps == 6
    for averaged in (False, True):
        trained = load_trained(tmp_path / "next", averaged)
        assert (trained.side, trained.net.num_classes) == (64, 3)
        assert [trained.class_name(i) for i in range(3)] == ["class0", "class1", "class2"]
    step = checkpoints(tmp_path / "next")[0]
    found = validate(step, images, device="cpu", backend="pil", progress=False)
    assert (found.top1, found.images) == (summary.top1, 12)
    found = validate(step, images, ema=True, device="cpu", backend="pil", progress=False)
    assert found.top1 == summary.ema_top1


@pytest.mark.parametrize("other", [None, *OTHERS], ids=["demansia_nano", "test_resnet", "test_vit"])
def test_training_heads_alone_leaves_all_else_bit_for_bit(data, run, tmp_path, other):
    """Weights, BatchNorm's statistics and their counters, in the run's weights and in their average."""
    begin, settings = run, {}
    if other is not None:
        begin, settings = tmp_path / "first", {**other, "model.args": {}}
        train.fit(tiny_config(*data, begin, **settings, **{"schedule.steps": 1}))
    tuned = {"model.weights": str(begin), "model.train": "heads", "ema.decay": 0.5, "optimizer.lr": 0.01}
    train.fit(tiny_config(*data, tmp_path / "next", **settings, **tuned, **{"run.save_every": 2}))
    before, folder = last(begin), checkpoints(tmp_path / "next")[0]
    for name in ("weights.safetensors", "ema.safetensors"):
        after = load_file(folder / name)
        assert same(before, after, HEADS)
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert {key.rsplit(".", 1)[1] for key in moved} == {"weight", "bias"}
        assert len(moved) == 4  # weight and bias of both heads


def test_heads_alone_for_other_classes_are_new_and_trained(run, tmp_path):
    images = make_images(tmp_path / "images")
    settings = {"model.weights": str(run), "model.train": "heads", "optimizer.lr": 0.01}
    train.fit(tiny_config(images, None, tmp_path / "a", **settings))
    train.fit(tiny_config(images, None, tmp_path / "b", **settings, **{"schedule.steps": 1}))
    first, second = last(tmp_path / "b"), last(tmp_path / "a")
    assert same(first, last(run), HEADS)
    assert same(first, second, HEADS)
    for name in ("head.weight", "aux_head.weight"):
        assert first[name].shape == (3, 16)
        assert not torch.equal(first[name], second[name])


def test_weights_of_another_model_are_refused_in_one_line(data, run, published, tmp_path, capsys):
    recipe = tmp_path / "tune.toml"
    args = {"embed_dim": 16, "d_state": 4}
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (run, {"model.name": "vim_tiny"}, "demansia_nano with patch_size 8, embed_dim 16"),
        (run, {"model.name": "test_vit", "model.args": {}}, "demansia_nano with patch_size 8"),
        (
            run,
            {"model.args": {**args, "depth": 1, "patch_size": 16}},
            "of another name or shape",
        ),
        (run, {"model.args": {**args, "depth": 2, "patch_size": 8}}, "weights missing"),
        (published, {"model.img_size": 64}, "DeMansia with embed_dim 32, depth 4"),
        (
            published,
            {"model.name": "test_resnet", "model.args": {}, "model.img_size": 64},
            "does not fit model.name 'test_resnet'",
        ),
        (tmp_path / "none.pth", {}, "there is no such checkpoint"),
        (tmp_path, {}, "there is no checkpoint in"),
        (published, {"model.weights_ema": True, "model.args": MICRO}, "no averaged weights"),
    ]
    for path, settings, expected in cases:
        config = tiny_config(*data, tmp_path / "next", **{"model.weights": str(path), **settings})
        recipe.write_text(to_toml(config))
        assert main(["fit", str(recipe)]) == 2, expected
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert told.count("\n") == 1
        assert expected in told
        assert not checkpoints(tmp_path / "next")


def test_windows_that_would_grow_with_the_image_are_refused_before_training(data, tmp_path):
    """timm scales a Swin's windows with its input, so that one built at the size has other shapes: no way back."""
    model = {"model.name": "swin_tiny_patch4_window7_224", "model.args": {"embed_dim": 12}, "schedule.steps": 1}
    train.fit(tiny_config(*data, tmp_path / "run", **model, **{"model.img_size": 64}))
    larger = {**model, "model.weights": str(tmp_path / "run"), "model.img_size": 128}
    with pytest.raises(InputError, match=r"another resolution than its weights', 64×64.*relative_position_bias_table"):
        train.fit(tiny_config(*data, tmp_path / "larger", **larger))
    assert not (tmp_path / "larger" / "checkpoints").exists()


def test_a_run_without_an_average_has_none_to_begin_with(data, tmp_path):
    train.fit(tiny_config(*data, tmp_path / "run", **{"schedule.steps": 1}))
    settings = {"model.weights": str(tmp_path / "run"), "model.weights_ema": True}
    with pytest.raises(InputError, match="no averaged weights"):
        train.fit(tiny_config(*data, tmp_path / "next", **settings))


@pytest.mark.parametrize("other", OTHERS, ids=["test_resnet", "test_vit"])
def test_other_backbones_train_resume_and_validate(data, tmp_path, other):
    """A run that goes on from its middle ends as the whole one, bit for bit."""
    settings = {**other, "model.args": {}, "ema.decay": 0.5, "run.save_every": 2, "run.keep": 9, "schedule.steps": 4}
    config = tiny_config(*data, tmp_path / "run", **settings, **{"data.validation": str(data[0])})
    summary = train.fit(config)
    whole = outcome(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for folder in [*checkpoints(tmp_path / "again"), *checkpoints(tmp_path / "again", "best")]:
        if folder.name not in ("step-00000002",):
            shutil.rmtree(folder)
    again = config.model_copy(update={"run": config.run.model_copy(update={"out": str(tmp_path / "again")})})
    assert train.fit(again, "auto").steps == 4
    assert outcome(tmp_path / "again") == whole
    found = validate(checkpoints(tmp_path / "run")[0], data[0], device="cpu", backend="pil", progress=False)
    assert (found.top1, found.images) == (summary.top1, 12)


def test_a_resumed_run_needs_no_more_the_weights_that_it_began_with(data, run, tmp_path):
    """They are in its checkpoints."""
    begin = shutil.copytree(run, tmp_path / "begin")
    settings = {"model.weights": str(begin), "run.save_every": 2, "schedule.steps": 4}
    config = tiny_config(*data, tmp_path / "next", **settings)
    train.fit(config)
    whole = outcome(tmp_path / "next")
    shutil.rmtree(checkpoints(tmp_path / "next")[0])
    shutil.rmtree(begin)
    train.fit(config, "auto")
    assert outcome(tmp_path / "next") == whole


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize(("name", "side"), [("test_resnet", None), ("test_vit", 160), ("test_vit", 32)])
def test_a_state_dict_of_timm_is_where_training_begins(data, tmp_path, name, side, suffix):
    """Its classes and its resolution may be others; `train.py` of timm wraps it, and has an average beside it."""
    torch.manual_seed(1)
    size = {} if side is None else {"img_size": side}
    backbone = timm.create_model(name, num_classes=7, **size)
    found, path = backbone.state_dict(), tmp_path / f"timm{suffix}"
    if suffix == ".safetensors":
        save_file(found, path)
    else:
        average = {key: value + 1 for key, value in found.items()}
        torch.save(found if suffix == ".pth" else {"state_dict": found, "state_dict_ema": average, "arch": name}, path)
    pixels = 32 if side else 64
    settings = {"model.name": name, "model.args": {}, "model.img_size": pixels, "model.weights": str(path)}
    net = build_network(tiny_config(*data, tmp_path / "run", **settings).model)
    begun = {key.removeprefix("backbone."): value for key, value in net.state_dict().items()}
    assert net.num_classes == 7
    resized = ("pos_embed",) if side == 160 else ()
    assert same(found, {key: value for key, value in begun.items() if key in found}, resized)
    if suffix == ".pth.tar":
        settings["model.weights_ema"] = True
        net = build_network(tiny_config(*data, tmp_path / "run", **settings).model)
        averaged = net.state_dict()
        assert all(torch.equal(averaged[f"backbone.{key}"], average[key]) for key in found if key not in resized)
    assert train.fit(tiny_config(*data, tmp_path / "run", **settings, **{"schedule.steps": 1})).steps == 1


def test_how_a_run_began_is_no_part_of_what_it_is(data, tmp_path):
    """It began with a file that `timm.create_model` read, which is gone when it validates and goes on."""
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "begin.pth")
    settings = {"model.name": "test_resnet", "model.img_size": 64, "run.save_every": 2, "schedule.steps": 4}
    begun = {**settings, "model.args": {"checkpoint_path": str(tmp_path / "begin.pth")}}
    train.fit(tiny_config(*data, tmp_path / "run", **begun))
    whole = outcome(tmp_path / "run")
    (tmp_path / "begin.pth").unlink()
    assert validate(tmp_path / "run", data[0], device="cpu", backend="pil", progress=False).images == 12
    for how in (begun, {**settings, "model.args": {}}):
        shutil.rmtree(checkpoints(tmp_path / "run")[0])
        train.fit(tiny_config(*data, tmp_path / "run", **how), "auto")
        found = outcome(tmp_path / "run")
        assert found == whole
    with pytest.raises(InputError, match=r"model\.args\.checkpoint_path is not a file: got '.*begin\.pth'"):
        train.fit(tiny_config(*data, tmp_path / "next", **begun))


def test_no_error_is_empty(capsys):
    for error in (FileNotFoundError(), InputError("it cannot be read", got=ValueError())):

        def fail(options: object, error: Exception = error) -> int:
            raise error

        run_command(Namespace(run=fail))
        assert capsys.readouterr().err.strip().endswith(("FileNotFoundError", "got ValueError"))
