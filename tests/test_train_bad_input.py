"""What does not fit is refused before any work, and a loss that is not finite harms nothing: one line, its status."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import tally
from tiny import make_images
from tiny_runs import outcome, tiny_config, tiny_data

from labeler import InputError
from labeler.sources.image_source import ImageSource
from pipeline import Batch, TokenLabelLoader
from train import fit
from train.__main__ import main
from train.recipes.recipe import to_toml
from train.record.checkpoint import check_checkpoint, read_state, read_weights
from train.record.checkpoint_folders import checkpoints, newest_checkpoint
from train.record.metrics import read_rows

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve images in six class folders, and their labels."""
    return tiny_data(tmp_path_factory.mktemp("bad_input"))


@pytest.fixture
def run(data, tmp_path, capsys) -> Run:
    """`python -m train fit` in this process: its status and its only line on standard error that is no log."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(tiny_config(*data, tmp_path / "run")))

    def command(*overrides: str) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["fit", str(recipe), *overrides])
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if not line.startswith(("INFO", "WARNING"))]
        if status:
            assert printed.out == ""
            assert len(errors) == 1
            assert errors[0].startswith("error: ")
        return status, "".join(errors)

    return command


REFUSED = {
    # overrides, and what the error says of them
    "images that are not there": (["data.images=nowhere"], "'nowhere' is not a folder of images: got nothing there"),
    "labels that are not there": (["data.store=nowhere"], "'nowhere' is not a label store: got no such folder"),
    "evaluation that is not there": (
        ["data.validation=nowhere"],
        "data.validation: 'nowhere' is not a folder of images",
    ),
    "list that is not there": (["data.image_list=nowhere"], "the image list 'nowhere' cannot be read"),
    "weights that are not there": (["model.weights=nowhere"], "there is no such checkpoint: got nowhere"),
    "other classes": (["model.num_classes=7"], "another number of classes than the network: got 6 in"),
    "batch larger than the data": (["batch_size=13"], "got 12 images, expected 13 or more. Use a smaller batch."),
    "model": (["model.name=vim_tinny"], "got 'vim_tinny'. Did you mean 'vim_tiny'?"),
    "argument of a model": (["model.args.foo=1"], "got foo, which it does not accept. model.args sets patch_size"),
    "images that do not divide into patches": (["model.img_size=33"], "got 33×33 pixels, expected multiples of 8"),
    "optimizer": (["optimizer.name=adamww"], "unknown optimizer.name: got 'adamww'. Did you mean 'adamw'?"),
    "float16 without a GPU": (["precision=float16"], "precision=float16 needs a GPU: expected float32 or bfloat16"),
    "device": (["run.device=tpu"], "unknown run.device: got 'tpu', expected auto, cpu or cuda"),
    "crop that shrinks": (["augment.scale=[1, 0.5]"], "scale does not fit: got (1.0, 0.5), expected two shares"),
    "augmentation": (["auto_augment=foo"], "auto_augment is not understood: got 'foo'"),
    "warm-up longer than the run": (["warmup_epochs=3"], "schedule.steps is too small for warm-up and cooldown"),
    "checkpoint that is not there": (["--resume", "nowhere"], "there is no checkpoint in 'nowhere'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_with_status_2(run, tmp_path, what):
    overrides, expected = REFUSED[what]
    status, error = run(*overrides)
    assert status == 2
    assert expected in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_an_evaluation_with_folders_that_training_had_not_names_them(run, data, tmp_path):
    shutil.copytree(data[0], tmp_path / "validation")
    (tmp_path / "validation/class2").rename(tmp_path / "validation/elephant")
    status, error = run(f"data.validation={tmp_path / 'validation'}")
    assert status == 2
    assert "the true class of 2 images is not known" in error
    assert "1 folder(s) that are not among the classes: 'elephant'" in error
    assert "folders with the names of the classes: 'class0'" in error


def test_a_folder_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        status, error = run(f"run.out={out}")
        assert status == 2
        assert f"run.out '{out}' cannot be written: got " in error
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.fault(15)
def test_labels_of_other_images_are_refused(run, tmp_path):
    others = make_images(tmp_path / "others", 14)
    status, error = run(f"data.images={others}")
    assert status == 2
    assert "images have no labels in" in error
    assert "Label these images too" in error


def test_labels_of_changed_images_are_refused(run, data, tmp_path):
    """The same names, other pictures: the store has seen others."""
    images, _ = data
    changed = tmp_path / "changed"
    keys = sorted(path.relative_to(images) for path in images.rglob("*.jpg"))
    for key, other in zip(keys, reversed(keys), strict=True):
        (changed / key).parent.mkdir(parents=True, exist_ok=True)
        (changed / key).write_bytes((images / other).read_bytes())
    status, error = run(f"data.images={changed}")
    assert status == 2
    assert "changed after they were labeled" in error
    assert "restore them or label them again" in error


def test_a_batch_that_does_not_divide_is_refused_by_each_rank_before_it_waits_for_others(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # nobody else is there: joining them would hang
    with pytest.raises(
        InputError, match=r"does not divide among the ranks: got 5 on 2\. Use 4, or another number of ranks"
    ):
        fit(tiny_config(*data, tmp_path / "run", **{"run.batch_size": 5}))


def test_a_run_is_not_begun_over_another(run):
    assert run("schedule.steps=2")[0] == 0
    status, error = run("schedule.steps=2")
    assert status == 2
    assert "already contains a run: got step-00000002. Continue it with --resume auto, or" in error


@pytest.fixture
def poison(monkeypatch) -> Callable[[set[int]], None]:
    """Makes all images of some batches, counted from the start of the run, NaN."""

    def at(steps: set[int]) -> None:
        original, count = TokenLabelLoader.__iter__, 0

        def poisoned(loader: TokenLabelLoader) -> Iterator[Batch]:
            nonlocal count
            for batch in original(loader):
                bad, count = count in steps, count + 1
                yield replace(batch, images=batch.images * math.nan) if bad else batch

        monkeypatch.setattr(TokenLabelLoader, "__iter__", poisoned)

    return at


@pytest.mark.fault(29)
def test_a_loss_that_is_not_finite_stops_the_run_with_what_to_try(run, tmp_path, poison):
    poison({3})
    status, error = run("run.save_every=2")
    assert status == 1
    assert "loss or gradient is not finite at step 4: got loss nan" in error
    assert f"{tmp_path / 'run/checkpoints/step-00000002'} is kept: --resume auto run.skip_non_finite=3" in error
    assert error.endswith("try a lower optimizer.lr, a longer schedule.warmup_epochs or optimizer.clip_grad=1.")
    folder, info = newest_checkpoint(tmp_path / "run") or pytest.fail("no checkpoint")
    assert info.step == 2
    assert all(value.isfinite().all() for value in read_weights(folder, info).values())
    tally(29, injected=1)


def test_a_rate_that_is_far_too_high_stops_the_run(run):
    status, error = run("lr=1e30", "optimizer.name=sgd")
    assert status == 1
    assert "loss or gradient is not finite at step 2" in error


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_is_answered_only_with_what_applies(run, poison, precision):
    """No checkpoint that is not there, nothing that is set already."""
    poison({0})
    _, error = run("optimizer.clip_grad=0.5", f"run.precision={precision}")
    assert "No checkpoint was saved before. Start again and try a lower optimizer.lr" in error
    assert not any(word in error for word in ("--resume", "kept", "model.weights", "clip_grad"))
    assert ("run.precision=float32" in error) == (precision == "bfloat16")


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    info = check_checkpoint(folder)
    average = {f"ema.{name}": value for name, value in read_weights(folder, info, ema=True).items()}
    return {**read_weights(folder, info), **average}


@pytest.mark.fault(29)
def test_a_step_that_is_not_finite_is_left_out_whole(data, tmp_path, poison, caplog):
    """Weights, their average, BatchNorm's statistics and the optimizer's moments are those of the step before."""
    out = tmp_path / "run"
    poison({2, 3})
    settings: dict[str, Any] = {"ema.decay": 0.9, "run.save_every": 1, "run.keep": 9, "run.skip_non_finite": 2}
    with caplog.at_level(logging.WARNING, "train"):
        summary = fit(tiny_config(*data, out, **settings))
    assert (summary.steps, summary.skipped) == (6, 2)
    assert "step 4 skipped: loss nan, gradient norm nan (2 in a row)" in caplog.text
    before, bad, after = weights(out, 2), weights(out, 4), weights(out, 5)
    assert any("running_var" in name for name in before)
    assert all(value.isfinite().all() for value in [*bad.values(), *after.values()])
    assert all(torch.equal(bad[name], before[name]) for name in before)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    found = newest_checkpoint(out) or pytest.fail("no checkpoint")
    moments = read_state(*found)["optimizer"]["state"].values()
    assert {int(state["step"]) for state in moments} == {4}
    assert all(state["exp_avg"].isfinite().all() for state in moments)
    # The rows of metrics stay JSON in the strict sense, with a loss of the steps that were done.
    rows = [row for row in read_rows(out) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 5, 6]
    assert all(math.isfinite(row["loss"]) for row in rows)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))
    tally(29, injected=1)


def test_metrics_of_several_steps_stay_finite_where_the_last_was_left_out(data, tmp_path, poison):
    out = tmp_path / "run"
    poison({2})
    fit(tiny_config(*data, out, **{"run.log_every": 3, "run.skip_non_finite": 1}))
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))
    assert [row["step"] for row in read_rows(out)] == [3, 6]


@pytest.mark.fault(29)
def test_bad_steps_count_in_a_row_and_too_many_stop_the_run(run, tmp_path, poison):
    poison({0, 1, 3, 4, 6, 7, 8})
    status, error = run("skip_non_finite=2", "schedule.steps=12")
    assert status == 1
    assert "not finite at step 9" in error
    tally(29, injected=1)


def test_all_bad_images_of_the_validation_are_named_at_once_with_their_setting(run, data, tmp_path):
    """By their full paths, before anything is trained; what only decoding finds is named in the evaluation."""
    folder = Path(shutil.copytree(data[0], tmp_path / "validation"))
    images = sorted(folder.rglob("*.*g"))
    assert len(images) == 12
    images[3].write_bytes(b"no image")
    images[7].write_bytes(b"")
    images[9].unlink()
    images[9].symlink_to("nowhere.jpg")
    status, error = run(f"data.validation={folder}")
    assert status == 4
    assert error.startswith("error: data.validation: 3 of 12 images cannot be used: got ")
    assert f"{str(images[3])!r} (not an image, or of an unknown format)" in error
    assert f"{str(images[7])!r} (empty file)" in error
    assert f"{str(images[9])!r} (a broken link)" in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))

    for i in (3, 7, 9):
        images[i].unlink()
    images[0].write_bytes(images[0].read_bytes()[:-20])
    status, error = run(f"data.validation={folder}")
    assert status == 4
    assert error.startswith(f"error: data.validation: the image {str(images[0])!r} cannot be used: got it cannot be")
    assert checkpoints(tmp_path / "run"), "what was trained before is saved"
    status, error = run(f"data.validation={tmp_path / 'nowhere'}", f"run.out={tmp_path / 'other'}")
    assert "error: data.validation: " in error


def test_of_very_many_bad_images_the_first_are_named(run, tmp_path):
    for i in range(30):
        (tmp_path / f"bad/class{i % 6}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"bad/class{i % 6}/{i}.jpg").write_bytes(b"x")
    _, error = run(f"data.validation={tmp_path / 'bad'}")
    assert "30 of 30 images cannot be used" in error
    assert "and 10 more. Restore the files, or leave them out." in error


NEEDS_NO_DATA = {
    "optimizer": (["optimizer.name=adamww"], "unknown optimizer.name: got 'adamww'. Did you mean 'adamw'?"),
    "optimizer's settings": (["optimizer.name=fusedadam"], "does not accept these settings"),
    "tracker": (["run.tracker=trackio"], "run.tracker 'trackio' cannot be imported"),
    "validation": (["data.validation=nowhere"], "data.validation: 'nowhere' is not a folder of images"),
    "images": (["data.images=nowhere"], "data.images: 'nowhere' is not a folder of images"),
    "store": (["data.store=nowhere"], "data.store: 'nowhere' is not a label store"),
    "model": (["model.name=demansia_tinny"], "got 'demansia_tinny'. Did you mean 'demansia_tiny'?"),
    "model like no other": (["model.name=qqqqqq"], "`python -m model list` and timm.list_models() list all"),
    "precision": (["run.precision=float16"], "precision=float16 needs a GPU"),
    "augmentation": (["auto_augment=foo"], "auto_augment is not understood"),
}
NEEDS_THEIR_NUMBER = {
    "steps": (["schedule.steps=6", "warmup_epochs=3"], "schedule.steps is too small for warm-up and cooldown"),
    "batch": (["run.batch_size=13"], "there are fewer images than one batch"),
}


@pytest.mark.parametrize("what", [*NEEDS_NO_DATA, *NEEDS_THEIR_NUMBER])
def test_what_needs_no_data_is_refused_before_any_image_is_looked_at_and_leaves_no_folder(
    run, tmp_path, monkeypatch, what
):
    read: list[str] = []
    opened = ImageSource.__init__
    monkeypatch.setattr(ImageSource, "__init__", lambda *given, **more: read.append("listed") or opened(*given, **more))
    monkeypatch.setattr(ImageSource, "head", lambda *given: read.append("opened"))
    monkeypatch.setitem(sys.modules, "trackio", None)
    overrides, expected = (NEEDS_NO_DATA | NEEDS_THEIR_NUMBER)[what]
    status, error = run("data.token_labels=false", "data.store=none", *overrides)
    assert (status, expected in error) == (2, True), error
    assert read == ([] if what in NEEDS_NO_DATA else ["listed"])
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_refused_and_leaves_no_folder(run, tmp_path, monkeypatch):
    def init(**settings: Any) -> None:
        raise ConnectionError("no account")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    status, error = run("run.tracker=wandb")
    assert (status, "run.tracker 'wandb' does not start: got no account" in error) == (2, True)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_was_there_before_a_refusal_stays(run, tmp_path):
    (tmp_path / "run").mkdir()
    assert run("optimizer.name=adamww")[0] == 2
    assert (tmp_path / "run").is_dir()


def test_lookahead_goes_before_any_optimizer_and_resumes_bit_for_bit(data, tmp_path):
    settings = {"optimizer.name": "lookahead_adamw", "run.save_every": 2, "run.keep": 9, "schedule.steps": 14}
    config = tiny_config(*data, tmp_path / "run", **settings)
    fit(config)
    whole = outcome(tmp_path / "run")
    for folder in checkpoints(tmp_path / "run"):
        if folder.name != "step-00000004":
            shutil.rmtree(folder)
    fit(config, "auto")
    assert outcome(tmp_path / "run") == whole
    fit(tiny_config(*data, tmp_path / "plain", **{**settings, "optimizer.name": "adamw"}))
    assert outcome(tmp_path / "plain")["last"]["weights"] != whole["last"]["weights"]
