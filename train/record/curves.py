"""Plots: a run's loss, accuracy and learning rate, and the schedules of recipes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labeler.base.whole_files import replace_file
from train.recipes.config import TrainConfig
from train.record.metrics import Row, read_rows

SIZE, DPI = (11, 3.4), 110
ACCURACIES = {"top1": "weights", "ema_top1": "moving average", "miou": "weights", "ema_miou": "moving average"}


def draw_run(folder: Path) -> bool:
    """Write `curves.png` from a run's metrics. Returns False if there is nothing to plot yet."""
    rows = read_rows(folder)
    if not rows:
        return False
    plots = _figure(3)
    figure, (loss, accuracy, rate) = plots
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    with_loss = [row for row in evaluations if "loss" in row]
    losses = {"training": (train, "loss", 1), **({"evaluation": (with_loss, "loss", 1)} if with_loss else {})}
    _line(loss, "loss (each with its own targets)", losses)
    keys = {key: text for key, text in ACCURACIES.items() if evaluations and key in evaluations[0]}
    title = "mean IoU, %" if "miou" in keys else "top-1, %"
    _line(accuracy, title, {text: (evaluations, key, 100) for key, text in keys.items()})
    _line(rate, "learning rate", {"": (train, "lr", 1)})
    _save(figure, folder / "curves.png")
    return True


def draw_comparison(runs: Mapping[str, Path], out: Path) -> None:
    """Plot loss and accuracy of several runs over their steps.

    Args:
        runs: name -> the run's folder.
        out: the image file.
    """
    figure, (loss, accuracy) = _figure(2)
    rows = {name: read_rows(folder) for name, folder in runs.items()}
    kinds = {
        kind: {name: [row for row in of_run if row["kind"] == kind] for name, of_run in rows.items()}
        for kind in ("train", "eval")
    }
    losses = {name: (train, "loss", 1) for name, train in kinds["train"].items()}
    _line(loss, "training loss (each with its own targets)", losses)
    _line(accuracy, "top-1 on unseen scenes, %", {name: (tests, "top1", 100) for name, tests in kinds["eval"].items()})
    _save(figure, out)


def draw_schedules(configs: Mapping[str, TrainConfig], out: Path, epoch_steps: int = 100) -> None:
    """Plot the learning rate of each recipe over its epochs, or over its steps if the recipe counts those.

    Args:
        configs: name -> recipe.
        out: the image file.
        epoch_steps: steps per epoch.
    """
    import torch

    from train.optimization import LearningRate, total_steps

    columns = 3
    figure, plots = _figure(columns, -(-len(configs) // columns))
    for plot, (name, config) in zip(plots, configs.items(), strict=False):
        parameter = torch.nn.Parameter(torch.zeros(1))
        rate = LearningRate(torch.optim.SGD([parameter], config.optimizer.lr), config.schedule, epoch_steps)
        steps = range(total_steps(config.schedule, epoch_steps))
        unit = "step" if config.schedule.steps else "epoch"
        plot.plot(
            [step / (epoch_steps if unit == "epoch" else 1) for step in steps], [rate.set(step) for step in steps]
        )
        plot.set_title(f"{name}: learning rate", fontsize=9)
        plot.set_xlabel(unit, fontsize=8)
    for plot in plots[len(configs) :]:
        plot.axis("off")
    _save(figure, out)


def _figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], SIZE[1] * rows), dpi=DPI, layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    for plot in plots:
        plot.grid(alpha=0.3)
        plot.tick_params(labelsize=8)
    return figure, plots


def _line(plot: Any, title: str, curves: Mapping[str, tuple[list[Row], str, float]]) -> None:
    plot.set_title(title, fontsize=9)
    plot.set_xlabel("step", fontsize=8)
    for label, (rows, key, factor) in curves.items():
        few = "o-" if len(rows) < 20 else "-"
        plot.plot([row["step"] for row in rows], [row[key] * factor for row in rows], few, ms=3, label=label)
    if any(curves):
        plot.legend(fontsize=8)


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_file(path, buffer.getvalue())
