"""What a run tells of itself: the same in `metrics.jsonl` and TensorBoard, however often it was interrupted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from tiny_runs import shown, tiny_config, tiny_data

from train import TrainConfig, fit
from train.errors import Stopped
from train.evaluation.evaluate import Accuracy
from train.evaluation.single_images import load_image, normalized
from train.evaluation.validate import load_trained
from train.ranks.distributed import Ranks
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
