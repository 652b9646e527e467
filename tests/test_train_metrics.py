"""What a run tells of itself: the same in `metrics.jsonl` and TensorBoard, however often it was interrupted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from tiny_runs import shown, tiny_config, tiny_data

from train import TrainConfig, fit, load_recipe
from train.errors import Stopped
from train.evaluation.evaluate import Accuracy
from train.evaluation.single_images import load_image, normalized
from train.evaluation.validate import load_trained
from train.ranks.distributed import Ranks
from train.record import curves
from train.record.checkpoint_folders import checkpoints
from train.record.metrics import read_rows
from train.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


def stop_after(config: TrainConfig, step: int) -> None:
    trainer = Trainer(config, Ranks(0, 1, torch.device("cpu")), "auto")
    run = trainer.train_step.run
    trainer.train_step.run = lambda batch, done, stop: run(batch, done, lambda: done == step - 1)
    with pytest.raises(Stopped):
        trainer.run()


def test_tensorboard_shows_the_rows_of_metrics_however_often_a_run_is_resumed(data, tmp_path):
    config = tiny_config(
        *data, tmp_path / "run", **{"run.tensorboard": True, "run.save_every": 2, "data.validation": str(data[0])}
    )
    for step in (2, 3, 6):
        stop_after(config, step)
    fit(config, "auto")
    fit(config, "auto")
    rows = read_rows(tmp_path / "run")
    expected = {
        (f"{row['kind']}/{key}", row["step"]): row[key]
        for row in rows
        for key in row.keys() - {"kind", "step", "epoch"}
    }
    points = [point for point in shown(tmp_path / "run") if not point[0].startswith("speed/")]
    assert len({point[:2] for point in points}) == len(points), "a point is there twice"
    assert {point[:2]: pytest.approx(point[2]) for point in points} == expected
    speeds = [step for name, step, _ in shown(tmp_path / "run") if name == "speed/images_per_s"]
    assert speeds == [1, 2, 3, 4, 5, 6]


def test_the_loss_of_an_evaluation_is_the_cross_entropy_and_stands_in_the_rows(data, tmp_path):
    fit(tiny_config(*data, tmp_path / "run", **{"data.validation": str(data[0]), "ema.decay": 0.5}))
    row = read_rows(tmp_path / "run")[-1]
    for name, averaged in (("loss", False), ("ema_loss", True)):
        trained = load_trained(checkpoints(tmp_path / "run")[0], averaged)
        paths = sorted(data[0].rglob("*.*g"))
        labels = torch.tensor([trained.class_folders[path.parent.name] for path in paths])
        with torch.inference_mode():
            logits = trained.net(normalized([load_image(path, trained) for path in paths], trained))
        assert row[name] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-3)


def test_the_table_keeps_losses_of_training_and_of_evaluations_apart(data, tmp_path):
    """Both happen at one step, and both have a loss."""
    fit(tiny_config(*data, tmp_path / "run", **{"data.validation": str(data[0])}))
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        table = {int(line["step"]): line for line in csv.DictReader(file)}
    for row in read_rows(tmp_path / "run"):
        for key in row.keys() - {"kind", "step", "epoch"}:
            assert float(table[row["step"]][f"{row['kind']}_{key}"]) == row[key]
    assert table[1]["eval_loss"] == ""
    assert sorted(table) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("averaged", [False, True])
def test_the_summary_says_at_which_step_the_best_checkpoint_was_made(data, tmp_path, monkeypatch, averaged):
    """Twice as good, the first one counts: it is the one that is kept."""
    top1 = iter([0.1, 0.4, 0.4, 0.2])

    def evaluated(networks, *_, **__):
        value = next(top1)
        one = Accuracy(0.05 if averaged else value, 0.5, 12, 1.0)
        return {"": one, **({"ema_": Accuracy(value, 0.5, 12, 1.0)} if averaged else {})}

    monkeypatch.setattr("train.trainer.evaluate", evaluated)
    settings = {"data.validation": str(data[0]), "schedule.steps": 12, **({"ema.decay": 0.5} if averaged else {})}
    summary = fit(tiny_config(*data, tmp_path / "run", **settings))
    (kept,) = checkpoints(tmp_path / "run", "best")
    assert kept.name == f"best-{summary.best_step:08d}" == "best-00000006"
    assert "best 40.00% at step 6;" in summary.text()


def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, list[float], list[float]]]:
    """Fills with title, label, x and y of each line of a picture that is saved."""
    found, save = [], curves._save

    def saved(figure, path):
        found.extend(
            (plot.get_title(), line.get_label(), list(line.get_xdata()), list(line.get_ydata()))
            for plot in figure.axes
            for line in plot.get_lines()
        )
        save(figure, path)

    monkeypatch.setattr(curves, "_save", saved)
    return found


def test_runs_are_compared_in_one_picture(tmp_path, monkeypatch):
    rows = {
        "one": '{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "eval", "step": 1, "top1": 0.25}\n',
        "two": '{"kind": "train", "step": 2, "loss": 1.5}\n',
    }
    for name, text in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    drawn = lines(monkeypatch)
    curves.draw_comparison({name: tmp_path / name for name in rows}, tmp_path / "both.png")
    assert [(title.split(",")[0].split(" (")[0], *rest) for title, *rest in drawn] == [
        ("training loss", "one", [1], [2.0]),
        ("training loss", "two", [2], [1.5]),
        ("top-1 on unseen scenes", "one", [1], [25.0]),
        ("top-1 on unseen scenes", "two", [], []),
    ]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_schedules_has_rates_that_rise_to_their_peak_and_fall(tmp_path, monkeypatch):
    drawn = lines(monkeypatch)
    by_steps = load_recipe("cifar10_nano", ["schedule.steps=40", "schedule.warmup_epochs=0.1"])
    by_epochs = load_recipe("cifar10_nano", ["schedule.epochs=2", "schedule.steps=none", "schedule.warmup_epochs=1"])
    curves.draw_schedules({"by steps": by_steps, "by epochs": by_epochs}, tmp_path / "rates.png", epoch_steps=100)
    (_, _, steps, rates), (_, _, epochs, others) = drawn
    for x, y, peak in ((steps, rates, rates.index(max(rates))), (epochs, others, others.index(max(others)))):
        assert x == sorted(x)
        assert y[: peak + 1] == sorted(y[: peak + 1])
        assert y[peak:] == sorted(y[peak:], reverse=True)
        assert by_steps.optimizer.lr / 2 < y[peak] < by_steps.optimizer.lr * 1.001
    assert (steps[0], steps[-1], len(steps)) == (0, 39, 40)
    assert (epochs[0], epochs[-1], len(epochs)) == (0, 1.99, 200)
