"""`fit`: train a model by a recipe, with checkpoints that resume bit for bit on a CPU.

A run's folder holds `config.toml`, `metrics.jsonl` and `.csv`, `speed.jsonl`, `curves.png`, `checkpoints/`,
`tensorboard/` and, at the end, `summary.json` and `timm/`, which timm and the labeler read.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from labeler.base.freed_memory import freed_memory_kept
from labeler.base.signals import StopSignals
from pipeline.batch import Batch
from train.errors import Stopped
from train.evaluation.evaluate import evaluate
from train.loaders import blamed_on, images_per_rank
from train.network import train_mode
from train.progress import Progress, evaluation_text, opening
from train.ranks.distributed import Ranks, joined_ranks, world_size
from train.recipes.config import TrainConfig
from train.recipes.recipe import refuse_absent_paths
from train.record.checkpoint_folders import checkpoints
from train.record.fit_summary import FitSummary, read_summary
from train.record.metrics import import_tracker
from train.record.run_folder import RunRecord, locked, starting_point
from train.record.speed import Speed
from train.record.timm_folder import leave_for_timm
from train.run_parts import RunParts
from train.segmentation.evaluate import MaskedImages, evaluate_segmentation
from train.step.step_result import StepResult

log = logging.getLogger("train")


def fit(config: TrainConfig, resume: str | Path | None = None) -> FitSummary:
    """Train a model. Under torchrun every rank calls this; only the first one writes files.

    Args:
        config: the recipe.
        resume: None: start a new run; "auto": continue from the newest valid checkpoint in the run's folder, if there
            is one; or the folder of a checkpoint or of a run to continue from.

    Returns:
        Accuracy, speed and number of steps.

    Raises:
        InputError: settings, images or labels cannot be used; raised before any work.
        MismatchError: the checkpoint, the labels or the images do not fit; raised before any work.
        NonFiniteError: the loss or the gradient is not finite.
        Stopped: a signal stopped the run; everything is saved.
    """
    # Checked by each rank before it waits for the others.
    images_per_rank(config, world_size())
    refuse_absent_paths(config)
    import_tracker(config.run.tracker)
    with (
        joined_ranks(config.run.device) as ranks,
        locked(Path(config.run.out)) if ranks.first else nullcontext(),
        freed_memory_kept(ranks.device.type == "cpu"),
    ):
        return Trainer(config, ranks, resume).run()


class Trainer:
    """One run, ready to continue from `step`. Arguments as for `fit`."""

    def __init__(self, config: TrainConfig, ranks: Ranks, resume: str | Path | None = None) -> None:
        self.config, self.ranks, self.folder = config, ranks, Path(config.run.out)
        start = starting_point(self.folder, resume)
        self.source = None if start is None else start[0]
        self.went_back = resume is not None and str(resume) != "auto"
        self.parts = parts = RunParts(config, ranks, None if start is None else start[1])
        self.loader, self.validation, self.task = parts.loader, parts.validation, parts.task
        self.train_step, self.steps, self.losses = parts.train_step, parts.steps, parts.losses
        self.step = 0
        self.unread: deque[tuple[int, float, StepResult]] = deque()  # step, learning rate, result
        if start is not None:
            parts.restore(*start)
            self.step = start[1].step
            if ranks.first:
                log.info("resumed from %s, step %d of %d", start[0], self.step, self.steps)

    def run(self) -> FitSummary:
        """Train from the current step to the last one."""
        again = self.step > 0 and self._evaluation_due()  # the previous process may have ended during it
        self.record = None
        if self.ranks.first:
            self.record = RunRecord(self.folder, self.config, self.step, self.source, self.went_back, again)
            self.parts.keep_frozen(self.folder)
        self.speed = Speed(self.config.run.batch_size)
        with (
            StopSignals() as signals,
            Progress(self.config.run.progress, self.ranks, self.step, self.steps) as self.progress,
        ):
            try:
                for line in self._opening():
                    self.progress.say(line)
                self._loop(signals, again)
            finally:
                if self.record is not None:
                    self.record.finish()
        summary = self._summary()
        if self.ranks.first:
            if not self.config.segments:
                leave_for_timm(self.folder)
            summary.write(self.folder)
        return summary

    def _opening(self) -> list[str]:
        net, loader, ranks = self.task.network, self.loader, self.ranks
        return opening(self.config, net, loader, self.validation, ranks, self.parts.precision, self.steps)

    def _loop(self, signals: StopSignals, evaluate_first: bool) -> None:
        if evaluate_first:
            self._evaluate(signals)
        if self.step == self.steps and not checkpoints(self.folder):
            self._save(must=True)  # a finished run that is continued in another folder
        train_mode(self.task.network, self.config.model)
        for batch in self.speed.timed(self._batches()):
            lr = self.parts.rate.set(self.step)
            self.task.criterion.temperature = self.config.loss.temperature_at(self.step, self.steps)
            result = self.train_step.run(batch, self.step, lambda: signals.requested is not None)
            self.step += 1
            self.unread.append((self.step, lr, result))
            evaluation = self._evaluation_due()
            save = evaluation or self._save_due()
            stop = self._read_results(all_of_them=save or not self.train_step.late)
            if stop and self.unread:
                self._read_results(all_of_them=True)
            if stop or save:
                self._save(must=stop or self.step == self.steps)
            if stop:
                raise Stopped(f"stopped after step {self.step}", remedy="`resume=auto` continues from there.")
            if evaluation:
                with self.speed.paused():
                    self._evaluate(signals)

    def _batches(self) -> Iterator[Batch]:
        """Batches of this epoch and all later ones, up to the last step."""
        while self.step < self.steps:
            for batch in self.loader:
                yield batch
                if self.step >= self.steps:
                    return

    def _read_results(self, all_of_them: bool) -> bool:
        """Count and report the steps whose results are read now, on a GPU all but the latest, which still runs.

        Returns:
            Whether a rank was asked to stop.
        """
        stop = False
        while len(self.unread) > (0 if all_of_them else 1):
            step, lr, result = self.unread.popleft()
            self.losses.add(result, step)
            self._report_step(step, lr, result)
            stop = stop or result.stop
        return stop

    def _report_step(self, step: int, lr: float, result: StepResult) -> None:
        """Show the step, and write a row of metrics and of speed where they are due."""
        self.progress.advance()
        if step % self.config.run.log_every and step != self.steps:
            return
        loss = self.losses.take_mean()
        speed, wait = self.speed.since_last()
        if self.record is not None:
            if loss is not None:
                values = {"loss": loss, "lr": lr}
                if math.isfinite(result.norm):  # JSON has no NaN
                    values["grad_norm"] = result.norm
                self.record.metrics.add({"kind": "train", "step": step, "epoch": self._epoch(step), **values})
            memory = torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else 0
            row = {"step": step, "images_per_s": speed, "data_wait": wait, "gpu_memory_gb": memory / 1e9}
            self.record.metrics.add_speed(row)
        values_text = [
            f"loss {result.loss:.4f}",
            f"lr {lr:.2e}",
            f"{speed:,.0f} images/s",
            f"{wait:.0%} waiting for data",
        ]
        self.progress.report_steps(self._where(step), values_text, self._left())

    def _epoch(self, step: int | None = None) -> float:
        return (self.step if step is None else step) / len(self.loader)

    def _save_due(self) -> bool:
        run = self.config.run
        if run.save_every is None and self.validation is not None:
            return self.step == self.steps  # a checkpoint is also saved before each evaluation
        return self.step == self.steps or self.step % (run.save_every or run.eval_every * len(self.loader)) == 0

    def _evaluation_due(self) -> bool:
        every = self.config.run.eval_every * len(self.loader)
        return self.validation is not None and (self.step == self.steps or self.step % every == 0)

    def _evaluate(self, signals: StopSignals) -> None:
        assert self.validation is not None
        networks: dict[str, torch.nn.Module] = {"": self.task.network}
        if self.parts.ema is not None:
            networks["ema_"] = self.parts.ema
        how: dict[str, Any] = {
            "precision": self.parts.precision,
            "progress": self.progress.on_terminal,
            "wanted": lambda: signals.requested is None,
        }
        found: dict[str, Any]
        with blamed_on("data.validation"):
            if isinstance(self.validation, MaskedImages):
                found = evaluate_segmentation(networks, self.validation, self.ranks, **how)
            else:
                how["channels_last"] = self.config.run.channels_last
                found = evaluate(networks, self.validation, self.ranks, **how)
        train_mode(self.task.network, self.config.model)
        if self.record is None:
            return
        measures = self.config.measures
        values = {f"{name}{key}": getattr(one, key) for name, one in found.items() for key in measures}
        better = max(values[measures[0]], values.get(f"ema_{measures[0]}", -1.0)) > self.record.best()
        losses = {f"{name}loss": getattr(one, "loss", math.nan) for name, one in found.items()}
        losses = {name: loss for name, loss in losses.items() if math.isfinite(loss)}  # JSON has no NaN
        each = {f"iou/{name}": iou for name, iou in self.parts.class_iou(found[""]).items()}
        row = {"kind": "eval", "step": self.step, "epoch": self._epoch(), **values, **each, **losses}
        row["images"] = found[""].images
        self.record.metrics.add(row)
        self._report_evaluation(row)
        if better:
            self._save(best=values)

    def _report_evaluation(self, row: dict[str, Any]) -> None:
        assert self.record is not None
        train = [one["loss"] for one in self.record.metrics.rows if one["kind"] == "train"]
        parts = evaluation_text(row, train[-1] if train else None, self.record.best())
        left = self._left()
        parts += [f"{self.speed.overall()[0]:,.0f} images/s", *left] if left else []
        self.progress.say(f"{self._where()}: {', '.join(parts)}")

    def _left(self) -> list[str]:
        """The estimated time for the remaining steps; empty if unknown, or if none remain."""
        rate, _ = self.speed.overall()
        if not rate or self.step == self.steps:
            return []
        return [f"{timedelta(seconds=round((self.steps - self.step) * self.config.run.batch_size / rate))} left"]

    def _where(self, step: int | None = None) -> str:
        step = self.step if step is None else step
        return f"step {step:,} of {self.steps:,}, epoch {self._epoch(step):.1f}"

    def _save(self, best: dict[str, float] | None = None, must: bool = False) -> None:
        if self.record is None:
            return
        parts = self.parts
        ema = None if parts.ema is None else parts.weights(parts.ema)
        state = parts.state_dict() if best is None else None
        self.record.save(parts.info(self.step, best or {}), parts.weights(self.task.network), ema, state, must)

    def _summary(self) -> FitSummary:
        rows = [] if self.record is None else [row for row in self.record.metrics.rows if row["kind"] == "eval"]
        last, measure = rows[-1] if rows else {}, self.config.measures[0]
        rate, wait = self.speed.overall()
        seconds = self.speed.seconds()
        if not self.speed.steps and (finished := read_summary(self.folder)):  # by an earlier process
            rate, wait, seconds = finished.images_per_s, finished.data_wait, finished.seconds
        return FitSummary(
            folder=str(self.folder),
            steps=self.step,
            epochs=self._epoch(),
            top1=last.get(measure, -1.0),
            ema_top1=last.get(f"ema_{measure}", -1.0),
            best=-1.0 if self.record is None else self.record.best(),
            images_per_s=rate,
            data_wait=wait,
            seconds=seconds,
            skipped=self.losses.skipped,
            best_step=-1 if self.record is None else self.record.best_step(),
            measure=measure,
        )
