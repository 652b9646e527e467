"""Interrupted in every way and resumed: the same weights, averages, optimizer state and metrics, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import counts, tally
from forked_runs import Blow, forks
from tiny import make_images
from tiny_runs import FULL, contents, outcome, shown, tiny_config, tiny_data, write_recipe

import train.task
from labeler import InputError, MismatchError
from train import TokenLabelLoss, TrainConfig, fit
from train.errors import Stopped
from train.ranks.distributed import Ranks
from train.record.checkpoint import check_checkpoint, read_weights
from train.record.checkpoint_folders import checkpoints
from train.record.metrics import read_rows
from train.record.run_folder import locked
from train.trainer import Trainer

SINGLE = Ranks(0, 1, torch.device("cpu"))
RUN, FORWARD = "train.task:TrainingStep.run", "train.task:TokenLabelTask.forward"
SAVE, WRITE = "train.record.run_folder:RunRecord.save", "train.record.checkpoint:_write"
COUNT = "train.evaluation.evaluate:count_right"
# Two forward passes make a step, three steps an epoch; an evaluation asks two networks about six batches.
PLACES = {
    "between steps": lambda draw: Blow(RUN, draw.randint(1, 3)),
    "inside an accumulation": lambda draw: Blow(FORWARD, 2 * draw.randint(1, 3)),
    "between update and average": lambda draw: Blow("train.task:TokenLabelTask.update_ema", draw.randint(1, 3)),
    "between a checkpoint's system calls": lambda draw: Blow(SAVE, 1, draw.randrange(30)),
    "in half a file of a checkpoint": lambda draw: Blow(WRITE, draw.randint(1, 4), half=True),
    "in the middle of an evaluation": lambda draw: Blow(COUNT, draw.randint(2, 11)),
    "between step and row": lambda draw: Blow("train.record.metrics:Metrics.add", 1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data: tuple[Path, Path], tmp_path: Path) -> TrainConfig:
    """Nine steps of two micro-batches, with everything that a resumed run could get wrong."""
    overrides = {**FULL, "data.validation": str(data[0]), "run.micro_batch": 2}
    overrides |= {"loss.temperature": 4.0, "loss.final_temperature": 0.5}
    return tiny_config(*data, tmp_path / "run", **overrides)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half the time of a tiny run and has no part in what is compared."""
    monkeypatch.setattr("train.record.run_folder.draw_run", lambda folder: False)


def into(config: TrainConfig, folder: Path, **run: Any) -> TrainConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"out": str(folder), **run})})


@pytest.mark.fault(25)
@pytest.mark.fault(30)
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_left_alone(config, tmp_path):
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"steps": 15})})
    undisturbed = tmp_path / "undisturbed"
    [ended] = forks().fit(write_recipe(into(config, undisturbed), tmp_path / "undisturbed.toml"))
    assert ended.status == 0, ended.errors

    recipe = write_recipe(config, tmp_path / "recipe.toml")
    draw = random.Random(17)
    kills = [*PLACES, *draw.sample(sorted(PLACES), counts(0, 3))]
    draw.shuffle(kills)
    for kill in kills:
        [ended] = forks().fit(recipe, "--resume", "auto", blow=PLACES[kill](draw))
        assert ended.status == -signal.SIGKILL, f"{kill}: {ended}"
    assert len(kills) == counts(7, 10)
    [ended] = forks().fit(recipe, "--resume", "auto")
    assert ended.status == 0, ended.errors
    assert outcome(Path(config.run.out)) == outcome(undisturbed)
    assert not list(Path(config.run.out).rglob(".tmp-*"))
    tally(25, kills=sum("checkpoint" in kill for kill in kills))
    tally(30, kills=len(kills), resumed=len(kills), resumed_equal=len(kills))


@pytest.mark.fault(30)
def test_a_run_that_is_resumed_at_every_step_ends_bit_for_bit_as_one_left_alone(config, tmp_path, no_curves):
    config = into(config, tmp_path / "undisturbed", save_every=1, keep=99)
    fit(config)
    whole = outcome(tmp_path / "undisturbed")
    steps = sorted((tmp_path / "undisturbed" / "checkpoints").glob("step-*"))
    assert len(steps) == 9
    for step, checkpoint in enumerate(steps[:-1], start=1):
        fit(into(config, tmp_path / f"from-{step}", keep=1), resume=checkpoint)
        found = outcome(tmp_path / f"from-{step}")
        assert found["last"] == whole["last"], step
        assert found["rows"] == whole["rows"], step
        tally(30, resumed=1, resumed_equal=1)


def test_each_step_has_its_temperature_whether_or_not_the_run_was_resumed(data, tmp_path, no_curves, monkeypatch):
    seen = []

    def forward(loss: TokenLabelLoss, outputs: Any, batch: Any) -> torch.Tensor:
        seen.append(loss.temperature)
        return original(loss, outputs, batch)

    original = TokenLabelLoss.forward
    monkeypatch.setattr(TokenLabelLoss, "forward", forward)
    annealed = {"schedule.steps": 5, "loss.temperature": 3.0, "loss.final_temperature": 1.0, "run.save_every": 1}
    config = tiny_config(*data, tmp_path / "run", **annealed, **{"run.keep": 9})
    fit(config)
    assert seen == [3.0, 2.5, 2.0, 1.5, 1.0]
    seen.clear()
    fit(into(config, tmp_path / "resumed"), resume=tmp_path / "run" / "checkpoints" / "step-00000002")
    assert seen == [2.0, 1.5, 1.0]
    whole = outcome(tmp_path / "run")["last"]
    assert outcome(tmp_path / "resumed")["last"] == whole
    constant = config.loss.model_copy(update={"final_temperature": None})
    fit(into(config, tmp_path / "constant").model_copy(update={"loss": constant}))
    assert outcome(tmp_path / "constant")["last"]["weights"] != whole["weights"]


class Cut(BaseException):
    """Nothing in the project catches it."""


@pytest.mark.fault(30)
def test_a_run_that_is_cut_off_inside_any_accumulation_ends_bit_for_bit_as_one_left_alone(
    config, tmp_path, no_curves, monkeypatch
):
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"steps": 5})})
    fit(into(config, tmp_path / "undisturbed"))
    whole = outcome(tmp_path / "undisturbed")
    forward = train.task.TokenLabelTask.forward
    for call in range(1, 11):
        calls = iter(range(1, 11))

        def cut(task: Any, batch: Any, calls: Any = calls, call: int = call) -> Any:
            found = forward(task, batch)
            if next(calls) == call:
                raise Cut
            return found

        config = into(config, tmp_path / f"cut-{call}")
        with monkeypatch.context() as patch:
            patch.setattr(train.task.TokenLabelTask, "forward", cut)
            with pytest.raises(Cut):
                fit(config)
        fit(config, resume="auto")
        assert outcome(tmp_path / f"cut-{call}") == whole, call
        tally(30, resumed=1, resumed_equal=1)


@pytest.mark.fault(28)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_saves_and_the_run_goes_on_bit_for_bit(config, tmp_path, no_curves, number):
    fit(into(config, tmp_path / "undisturbed", save_every=None))
    config = into(config, tmp_path / "run", save_every=None)
    recipe = write_recipe(config, tmp_path / "recipe.toml")
    # In the fifth step, in the third one after that, and in the middle of the last evaluation.
    blows = [Blow(FORWARD, 9), Blow(FORWARD, 5), Blow(COUNT, 5)]
    for blow, step in zip(blows, (5, 8, 9), strict=True):
        [ended] = forks().fit(recipe, "--resume", "auto", blow=replace(blow, number=number))
        assert ended.status == Stopped.exit_status, ended.errors
        assert ended.errors.splitlines()[-1].startswith("error: ")
        newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
        assert newest.name == f"step-{step:08d}"
    fit(config, resume="auto")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")
    tally(28, injected=len(blows), resumed=len(blows), resumed_equal=len(blows))


@pytest.mark.fault(28)
def test_the_command_stops_at_sigterm_with_143_and_goes_on_where_it_stopped(data, tmp_path, no_curves):
    # A hundred steps take over a second; the signal comes when the first of them are told.
    config = tiny_config(*data, tmp_path / "run", **{"schedule.steps": 100})
    fit(into(config, tmp_path / "undisturbed"))
    recipe = write_recipe(config, tmp_path / "recipe.toml")
    command = [sys.executable, "-m", "train", "fit", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    rows = tmp_path / "run" / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    found = re.fullmatch(r"error: stopped after step (\d+). --resume auto continues from there.", last)
    assert found, errors
    assert (tmp_path / "run" / "checkpoints" / f"step-{int(found[1]):08d}").is_dir()
    assert len(read_rows(tmp_path / "run")) == int(found[1]) < 100
    fit(config, resume="auto")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")
    tally(28, injected=1, resumed=1, resumed_equal=1)


def test_without_evaluations_every_epoch_ends_with_a_checkpoint(data, tmp_path, no_curves):
    config = tiny_config(*data, tmp_path / "run", **{"schedule.steps": 8, "run.keep": 9})
    fit(config)
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["8", "6", "3"]
    fit(into(config, tmp_path / "rarely", eval_every=2))
    assert [path.name[-1] for path in checkpoints(tmp_path / "rarely")] == ["8", "6"]


def test_going_back_to_a_named_checkpoint_gives_up_the_later_ones(config, tmp_path, no_curves):
    """Or the abandoned way would win: the newest checkpoint, and the best one, are those of the highest step."""
    config = into(config, tmp_path / "run", keep=9)
    fit(config)
    expected = outcome(tmp_path / "run")
    best = [path.name for path in checkpoints(tmp_path / "run", "best")]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    stop_at = 6
    trainer = Trainer(config, SINGLE, tmp_path / "run" / "checkpoints" / "step-00000004")
    original = trainer.train_step.run
    trainer.train_step.run = lambda batch, step, stop: original(batch, step, lambda: step == stop_at - 1)
    with pytest.raises(Stopped):
        trainer.run()
    assert [int(path.name[-8:]) for path in checkpoints(tmp_path / "run")] == [6, 4, 3, 2]
    assert all(int(path.name[-8:]) <= stop_at for path in checkpoints(tmp_path / "run", "best")), best
    fit(config, resume="auto")
    assert outcome(tmp_path / "run") == expected
    with pytest.raises(InputError, match="contains another run than the one to continue from"):
        fit(config, resume=tmp_path / "copy")


def test_half_a_row_of_metrics_is_left_out_when_a_run_goes_on(config, tmp_path, no_curves):
    fit(into(config, tmp_path / "undisturbed"))
    [ended] = forks().fit(write_recipe(config, tmp_path / "recipe.toml"), blow=Blow(RUN, 6))
    assert ended.status == -signal.SIGKILL
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "step": 6, "lo')
    fit(config, resume="auto")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("kind", "short", "long"),
    [
        ("constant", {"steps": 4}, {"steps": 9}),
        ("restarts", {"steps": 4, "first_cycle": 1.0}, {"steps": 9, "first_cycle": 1.0}),
        ("cosine", {"epochs": 1.0}, {"epochs": 1.0, "cooldown_epochs": 2.0}),
    ],
)
def test_a_finished_run_goes_on_longer_as_if_it_had_been_meant_to(data, tmp_path, no_curves, kind, short, long):
    """Where the longer schedule would have led to the same checkpoint, weights end equal bit for bit."""
    unset = {"steps": None, "warmup_epochs": 0.0, "kind": kind}
    config = tiny_config(*data, tmp_path / "run", **FULL)

    def lasting(schedule: dict[str, Any], folder: Path) -> TrainConfig:
        changed = config.schedule.model_copy(update={**unset, **schedule})
        return into(config.model_copy(update={"schedule": changed}), folder)

    fit(lasting(short, tmp_path / "run"))
    summary = fit(lasting(long, tmp_path / "run"), resume="auto")
    assert summary.steps == 9
    fit(lasting(long, tmp_path / "undisturbed"))
    last, undisturbed = (contents(checkpoints(tmp_path / run)[0]) for run in ("run", "undisturbed"))
    assert last["weights"] == undisturbed["weights"]
    assert last["ema"] == undisturbed["ema"]


def test_a_cosine_of_another_length_and_a_schedule_that_is_over_are_refused(stopped):
    def lasting(**schedule: Any) -> TrainConfig:
        return stopped.model_copy(update={"schedule": stopped.schedule.model_copy(update=schedule)})

    with pytest.raises(
        MismatchError, match=r"differs before the checkpoint, from step 2 on: .* more schedule\.cooldown_epochs\. "
    ):
        fit(lasting(steps=12), resume="auto")
    with pytest.raises(MismatchError, match=r"beyond the end of this schedule: got step 4, expected up to 2$"):
        fit(lasting(steps=2), resume="auto")


def test_resuming_a_finished_run_changes_nothing(config, tmp_path, no_curves):
    summary = fit(config)
    whole = outcome(tmp_path / "run")
    again = fit(config, resume="auto")
    assert outcome(tmp_path / "run") == whole
    assert again == summary
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == asdict(summary)
    assert summary.images_per_s > 0


def test_auto_begins_where_there_is_nothing_to_resume_and_a_named_run_must_be_there(config, tmp_path, no_curves):
    with pytest.raises(InputError, match=r"there is no checkpoint in .*: expected \"auto\""):
        fit(config, resume=tmp_path / "nowhere")
    assert fit(config, resume="auto").steps == 9


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("optimizer", "lr", 0.002, r"got optimizer\.lr 0\.002, expected optimizer\.lr 0\.001\."),
        ("run", "batch_size", 8, r"got run\.batch_size 8, expected run\.batch_size 4\."),
        ("run", "seed", 1, r"got run\.seed 1, expected run\.seed 0\."),
        ("model", "num_classes", 6, r"got model\.num_classes 6, expected model\.num_classes None\."),
        ("loss", "temperature", 2.0, r"got loss\.temperature 2\.0, expected loss\.temperature 1\.0\."),
        (
            "loss",
            "final_temperature",
            2.0,
            r"got loss\.final_temperature 2\.0, expected .* None\.",
        ),
        ("schedule", "steps", 12, r"got schedule\.steps 12, expected schedule\.steps 4\."),
    ],
)
def test_another_recipe_is_refused_with_the_key_and_both_values(stopped, section, key, value, said):
    changed = getattr(stopped, section).model_copy(update={key: value})
    with pytest.raises(MismatchError, match=said):
        fit(stopped.model_copy(update={section: changed}), resume="auto")
    tally(31, injected=1)


@pytest.fixture(scope="module")
def stopped(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run with checkpoints that could go on, were it not finished."""
    config = tiny_config(*data, tmp_path_factory.mktemp("stopped") / "run", **{"schedule.steps": 4})
    fit(config)
    return config


def test_what_changes_no_weight_may_change_between_a_run_and_its_resumption(stopped, data, tmp_path):
    moved = Path(shutil.copytree(data[0], tmp_path / "moved"))
    labels = Path(shutil.copytree(data[1], tmp_path / "labels"))
    sections = {
        "data": stopped.data.model_copy(
            update={"images": str(moved), "store": str(labels), "threads": 2, "prefetch": 3, "cache": "ram"}
        ),
        "run": stopped.run.model_copy(
            update={"save_every": 1, "keep": 5, "skip_non_finite": 3, "log_every": 3, "eval_every": 2}
        ),
        "augment": stopped.augment.model_copy(update={"crop_pct": 1.0, "crop_mode": "squash"}),
        "model": stopped.model.model_copy(update={"aux_weight": 0.0}),
    }
    assert fit(stopped.model_copy(update=sections), resume="auto").steps == 4


@pytest.mark.parametrize(("key", "value"), [("device", "auto"), ("threads", 2)])
def test_what_changes_rounding_alone_may_change_and_is_said(stopped, monkeypatch, caplog, key, value):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changed = stopped.model_copy(update={"run": stopped.run.model_copy(update={key: value})})
    with caplog.at_level("WARNING", "train"):
        assert fit(changed, resume="auto").steps == 4
    assert f"resumed with run.{key}={value} instead of {getattr(stopped.run, key)}" in caplog.text


def test_an_evaluation_that_is_not_done_again_keeps_its_row(config, tmp_path, no_curves):
    """One that stood at the very step of the checkpoint, where the run goes on with rarer ones."""
    fit(into(config, tmp_path / "run", keep=9, save_every=3))
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [3, 6, 9]
    fit(into(config, tmp_path / "run", keep=9, eval_every=9), resume=tmp_path / "run/checkpoints/step-00000006")
    assert read_rows(tmp_path / "run") == rows


def test_history_and_best_checkpoint_go_along_into_another_folder(config, tmp_path, no_curves):
    fit(into(config, tmp_path / "a", keep=9))
    whole = outcome(tmp_path / "a")
    best = int(checkpoints(tmp_path / "a", "best")[0].name[-8:])
    fit(into(config, tmp_path / "b", tensorboard=True), resume=tmp_path / "a")
    assert outcome(tmp_path / "b") == whole
    assert contents(tmp_path / f"b/checkpoints/best-{best:08d}") == whole["best"][0]
    assert outcome(tmp_path / "a") == whole
    assert {step for _, step, _ in shown(tmp_path / "b")} >= {row["step"] for row in whole["rows"]}


@pytest.mark.fault(31)
def test_other_images_are_refused(stopped, tmp_path):
    images, store = tiny_data(tmp_path, 18)
    other = stopped.data.model_copy(update={"images": str(images), "store": str(store)})
    with pytest.raises(MismatchError, match="the saved state belongs to another loader: got fingerprint") as caught:
        fit(stopped.model_copy(update={"data": other}), resume="auto")
    assert re.search(r"of 12 images, expected .* of 18 images.*or start anew .* as model\.weights=", str(caught.value))
    tally(31, injected=1)


def test_another_class_count_is_refused(tmp_path):
    config = tiny_config(make_images(tmp_path / "three"), None, tmp_path / "run", **{"schedule.steps": 2})
    fit(config)
    images = make_images(tmp_path / "four", classes=4)
    with pytest.raises(MismatchError, match="the saved state belongs to another loader: got fingerprint"):
        fit(tiny_config(images, None, tmp_path / "run", **{"schedule.steps": 2}), resume="auto")


def test_a_folder_that_holds_a_run_is_refused_without_resume(stopped):
    with pytest.raises(InputError, match=r"already contains a run: got step-00000004. Continue it with `resume=auto`"):
        fit(stopped)


def test_a_second_process_in_the_same_folder_is_refused(stopped, tmp_path):
    recipe = write_recipe(stopped, tmp_path / "recipe.toml")
    with locked(Path(stopped.run.out)):
        [ended] = forks().fit(recipe, "--resume", "auto")
    assert ended.status == 2
    assert re.fullmatch(
        r"error: another process is training in '.*'\. Wait for it, or choose another run\.out\.\n", ended.errors
    )
    [ended] = forks().fit(recipe, "--resume", "auto")
    assert ended.status == 0, ended.errors


def test_a_resumed_run_keeps_its_threads_where_the_recipe_names_none(data, tmp_path, no_curves):
    config = tiny_config(*data, tmp_path / "run", **{"schedule.steps": 2, "run.threads": None})
    before = torch.get_num_threads()
    try:
        fit(config)
        saved = torch.get_num_threads()
        torch.set_num_threads(saved + 1)
        fit(config, resume="auto")
        assert torch.get_num_threads() == saved
    finally:
        torch.set_num_threads(before)


def test_the_average_begins_with_the_first_steps_weights_and_then_lags(config, tmp_path, no_curves):
    """timm's average copies after step 1 and is an average, at the full decay, from step 2 on."""
    ema = config.ema.model_copy(update={"decay": 0.5})
    fit(into(config.model_copy(update={"ema": ema}), tmp_path / "run", save_every=1, keep=9))
    first, second = (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" for step in (1, 2))
    w1, w2 = (read_weights(folder, check_checkpoint(folder)) for folder in (first, second))
    e1, e2 = (read_weights(folder, check_checkpoint(folder), ema=True) for folder in (first, second))
    for name, value in w1.items():
        assert torch.equal(e1[name], value), name
        if value.is_floating_point():
            torch.testing.assert_close(e2[name], (value + w2[name]) / 2, rtol=1e-6, atol=1e-7)
