"""`fit`: train a model by a recipe, with checkpoints that resume bit for bit on a CPU.

A run's folder holds `config.toml`, `metrics.jsonl` and `.csv`, `speed.jsonl`, `curves.png`, `checkpoints/`,
`tensorboard/` and, at the end, `summary.json` and `timm/`, which timm and the labeler read.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from labeler.base.errors import InputError, IntegrityError, MismatchError, TokenLabelError, error_text
from labeler.base.freed_memory import freed_memory_kept
from labeler.base.runtime import DTYPES, pick_precision, set_threads
from labeler.base.whole_files import replace_file
from pipeline.batch import Batch
from train.errors import NonFiniteError, Stopped
from train.evaluation.evaluate import evaluate
from train.evaluation.validate import load_trained
from train.loaders import (
    blamed_on,
    class_folders,
    images_per_rank,
    training_loader,
    transform_of,
    validation_loader,
)
from train.loss.token_label_loss import TokenLabelLoss
from train.network import as_checkpointed, build_network, set_classes, train_mode
from train.optimization import LearningRate, build_optimizer, total_steps
from train.progress import Progress, evaluation_text, opening
from train.ranks.distributed import Ranks, joined_ranks, world_size
from train.ranks.stop_signals import StopSignals
from train.recipes.config import TrainConfig
from train.recipes.recipe import refuse_absent_paths
from train.record.checkpoint import CheckpointInfo, checkpoints, read_state, read_weights
from train.record.continuation import refuse_other_past, refuse_other_run
from train.record.metrics import import_tracker
from train.record.run_folder import RunRecord, locked, starting_point
from train.record.timm_folder import write_timm_folder
from train.speed import Speed
from train.task import StepResult, TokenLabelTask, TrainingStep

log = logging.getLogger("train")


@dataclass(frozen=True)
class FitSummary:
    """Result of a run.

    Attributes:
        folder: the run's folder.
        steps: steps done.
        epochs: epochs done.
        top1: accuracy of the last evaluation; −1: there was none.
        ema_top1: the same for the moving average of the weights.
        best: best accuracy of all evaluations; −1: there was none.
        images_per_s: training speed over all ranks, without evaluations, measured in this process. If nothing was left
            to do, that of the process that finished the run; so are `data_wait` and `seconds`.
        data_wait: share of that time spent waiting for data.
        seconds: duration of this process's part of the run.
        skipped: steps skipped because loss or gradient were not finite.
        best_step: step of the best evaluation; −1: there was none.
    """

    folder: str
    steps: int
    epochs: float
    top1: float
    ema_top1: float
    best: float
    images_per_s: float
    data_wait: float
    seconds: float
    skipped: int
    best_step: int = -1

    def text(self) -> str:
        """The summary in one line."""
        ema = f", of the moving average {self.ema_top1:.2%}" if self.ema_top1 >= 0 else ""
        best = f"best {self.best:.2%} at step {self.best_step:,}"
        accuracy = f"top-1 {self.top1:.2%}{ema}, {best}" if self.top1 >= 0 else "no evaluation"
        return (
            f"{self.steps:,} steps ({self.epochs:.1f} epochs): {accuracy}; {self.images_per_s:,.0f} images/s, "
            f"{self.data_wait:.0%} of the time waiting for data; {self.seconds:,.0f} s; {self.folder}"
        )


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
        if start is not None:
            refuse_other_run(config, start[1], ranks)
        self.threads = set_threads(config.run.threads or (None if start is None else start[1].threads))
        self.precision = DTYPES[pick_precision(config.run.precision, ranks.device)]
        if self.precision == torch.float16 and ranks.device.type == "cpu":
            raise InputError("run.precision=float16 needs a GPU", expected="float32 or bfloat16 on a CPU")
        torch.manual_seed(config.run.seed)  # the same initial weights on all ranks
        model = config.model if start is None else as_checkpointed(config.model, start[1])
        net = build_network(model, config.loss.dense_weight)
        build_optimizer(net, config.optimizer)  # checks the settings before any image is read; heads may change below
        self.loader = training_loader(config, net, ranks)
        if start is not None:
            refuse_other_past(config, start[1], len(self.loader))
        set_classes(net, self.loader.num_classes, model)
        # Computed once, as it takes a pass over all images; every checkpoint records it.
        self.class_folders = class_folders(self.loader)
        self.transform = transform_of(config, net, self.loader.samples.orientation)
        self.validation = validation_loader(config, net, ranks, self.loader, self.class_folders)
        self.steps = total_steps(config.schedule, len(self.loader))
        self.step = self.skipped = 0
        self._loss_sum, self._loss_steps, self._bad_in_a_row = 0.0, 0, 0
        self._prepare(net)
        if start is not None:
            self._restore(*start)

    def _prepare(self, net: Any) -> None:
        config, ranks = self.config, self.ranks
        if config.run.grad_checkpointing:
            net.set_grad_checkpointing(True)
        if config.run.channels_last:
            net = net.to(memory_format=torch.channels_last)
        loss = TokenLabelLoss(**config.loss.model_dump(exclude={"final_temperature"}), grid=self.loader.config.grid)
        self.task = TokenLabelTask(net, loss, ranks.device)
        self.optimizer = build_optimizer(net, config.optimizer)
        self.rate = LearningRate(self.optimizer, config.schedule, len(self.loader))
        if config.ema.decay is not None:
            self.task.setup_ema(config.ema.decay, config.ema.warmup)
        if config.run.compile:
            self.task.compile()
        if ranks.world_size > 1:
            self.task.prepare_distributed([ranks.device.index] if ranks.device.type == "cuda" else None)
        self.train_step = TrainingStep(
            self.task,
            self.optimizer,
            ranks,
            seed=config.run.seed,
            micro_batch=config.run.micro_batch,
            clip_grad=config.optimizer.clip_grad,
            precision=self.precision,
            channels_last=config.run.channels_last,
        )

    @property
    def ema(self) -> torch.nn.Module | None:
        """The network with averaged weights; None: the recipe has no moving average."""
        return self.task.trainable_module_ema.module if self.task.has_ema() else None

    def run(self) -> FitSummary:
        """Train from the current step to the last one."""
        again = self.step > 0 and self._evaluation_due()  # the previous process may have ended during it
        self.record = None
        if self.ranks.first:
            self.record = RunRecord(self.folder, self.config, self.step, self.source, self.went_back, again)
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
            self._leave_for_timm()
            replace_file(self.folder / "summary.json", json.dumps(asdict(summary), indent=1).encode() + b"\n")
        return summary

    def _leave_for_timm(self) -> None:
        """Write the best weights for timm and the labeler. A run does not fail if that is not possible."""
        try:
            trained = load_trained(self.folder)
            names = [trained.class_name(number) for number in range(trained.net.num_classes)]
            write_timm_folder(self.folder, trained.net, trained.transform, names)
        except (TokenLabelError, OSError, ValueError, LookupError, AttributeError, AssertionError) as error:
            log.warning("no folder for timm is left in %s: %s", self.folder, error_text(error))

    def _opening(self) -> list[str]:
        net, loader, ranks = self.task.network, self.loader, self.ranks
        return opening(self.config, net, loader, self.validation, ranks, self.precision, self.steps)

    def _loop(self, signals: StopSignals, evaluate_first: bool) -> None:
        if evaluate_first:
            self._evaluate(signals)
        if self.step == self.steps and not checkpoints(self.folder):
            self._save(must=True)  # a finished run that is continued in another folder
        train_mode(self.task.network, self.config.model)
        for batch in self.speed.timed(self._batches()):
            rate = self.rate.set(self.step)
            self.task.criterion.temperature = self.config.loss.temperature_at(self.step, self.steps)
            result = self.train_step.run(batch, self.step, lambda: signals.requested is not None)
            self.step += 1
            self._note(result, rate)
            self._report_speed(result.loss, rate)
            evaluation = self._evaluation_due()
            if result.stop or evaluation or self._save_due():
                self._save(must=result.stop or self.step == self.steps)
            if result.stop:
                raise Stopped(f"stopped after step {self.step}", remedy="--resume auto continues from there.")
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

    def _note(self, result: StepResult, rate: float) -> None:
        """Add the step's loss to the next row of metrics. Raises NonFiniteError after too many bad steps in a row."""
        if result.done:
            self._bad_in_a_row = 0
            self._loss_sum, self._loss_steps = self._loss_sum + result.loss, self._loss_steps + 1
        else:
            self._bad_in_a_row, self.skipped = self._bad_in_a_row + 1, self.skipped + 1
            bad = f"loss {result.loss}, gradient norm {result.norm}"
            if self._bad_in_a_row > self.config.run.skip_non_finite:
                raise NonFiniteError(
                    f"loss or gradient is not finite at step {self.step}", got=bad,
                    remedy=_what_to_try(self.config, self.precision),
                )  # fmt: skip
            log.warning("step %d skipped: %s (%d in a row)", self.step, bad, self._bad_in_a_row)
        if self.step % self.config.run.log_every and self.step != self.steps:
            return
        if self.record is not None and self._loss_steps:
            values = {"loss": self._loss_sum / self._loss_steps, "lr": rate}
            if math.isfinite(result.norm):  # JSON has no NaN
                values["grad_norm"] = result.norm
            self.record.metrics.add({"kind": "train", "step": self.step, "epoch": self._epoch(), **values})
        self._loss_sum, self._loss_steps = 0.0, 0

    def _report_speed(self, loss: float, lr: float) -> None:
        self.progress.advance()
        if self.step % self.config.run.log_every and self.step != self.steps:
            return
        rate, wait = self.speed.since_last()
        values = [f"loss {loss:.4f}", f"lr {lr:.2e}", f"{rate:,.0f} images/s", f"{wait:.0%} waiting for data"]
        self.progress.report_steps(self._where(), values, self._left())
        if self.record is not None:
            memory = torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else 0
            row = {"step": self.step, "images_per_s": rate, "data_wait": wait, "gpu_memory_gb": memory / 1e9}
            self.record.metrics.add_speed(row)

    def _epoch(self) -> float:
        return self.step / len(self.loader)

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
        if self.ema is not None:
            networks["ema_"] = self.ema
        with blamed_on("data.validation"):
            accuracies = evaluate(
                networks,
                self.validation,
                self.ranks,
                precision=self.precision,
                channels_last=self.config.run.channels_last,
                progress=self.progress.on_terminal,
                wanted=lambda: signals.requested is None,
            )
        train_mode(self.task.network, self.config.model)
        if self.record is None:
            return
        values = {f"{name}{key}": getattr(a, key) for name, a in accuracies.items() for key in ("top1", "top5")}
        better = max(values["top1"], values.get("ema_top1", -1.0)) > self.record.best()
        losses = {f"{name}loss": a.loss for name, a in accuracies.items() if math.isfinite(a.loss)}  # JSON has no NaN
        row = {
            "kind": "eval",
            "step": self.step,
            "epoch": self._epoch(),
            **values,
            **losses,
            "images": accuracies[""].images,
        }
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

    def _where(self) -> str:
        return f"step {self.step:,} of {self.steps:,}, epoch {self._epoch():.1f}"

    def _save(self, best: dict[str, float] | None = None, must: bool = False) -> None:
        if self.record is None:
            return
        ema = None if self.ema is None else self.ema.state_dict()
        state = self._state() if best is None else None
        self.record.save(self._info(best or {}), self.task.network.state_dict(), ema, state, must)

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.train_step.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "loss_sum": self._loss_sum,
            "loss_steps": self._loss_steps,
            "bad_in_a_row": self._bad_in_a_row,
            "skipped": self.skipped,
        }

    def _info(self, accuracy: dict[str, float]) -> CheckpointInfo:
        store = self.loader.samples.store
        return CheckpointInfo(
            step=self.step,
            epoch=self.loader.epoch,
            model=self.config.model.model_dump(),
            num_classes=self.loader.num_classes,
            aux_weight=self.task.network.aux_weight,
            class_names=list(store.meta.class_names) if store else [],
            class_folders=self.class_folders,
            transform=self.transform,
            config=self.config.model_dump(),
            world_size=self.ranks.world_size,
            threads=self.threads,
            accuracy=accuracy,
        )

    def _restore(self, folder: Path, info: CheckpointInfo) -> None:
        state = read_state(folder, info)
        try:
            self.loader.load_state_dict(state["loader"])
            self.task.network.load_state_dict(read_weights(folder, info))
            if self.ema is not None:
                self.ema.load_state_dict(read_weights(folder, info, ema=True))
            self.optimizer.load_state_dict(state["optimizer"])
            self.train_step.scaler.load_state_dict(state["scaler"])
            self.step, self.skipped, self._bad_in_a_row = info.step, state["skipped"], state["bad_in_a_row"]
            self._loss_sum, self._loss_steps = state["loss_sum"], state["loss_steps"]
        except MismatchError as error:
            remedy = "Resume with the same images, labels and settings, or start anew with that run as model.weights=."
            raise MismatchError(error.problem, got=error.got, expected=error.expected, remedy=remedy) from None
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise _unfit(folder, error) from None
        if self.ranks.first:
            log.info("resumed from %s, step %d of %d", folder, self.step, self.steps)

    def _summary(self) -> FitSummary:
        rows = [] if self.record is None else [row for row in self.record.metrics.rows if row["kind"] == "eval"]
        last = rows[-1] if rows else {}
        rate, wait = self.speed.overall()
        seconds = self.speed.seconds()
        if not self.speed.steps and (finished := _read_summary(self.folder)):  # by an earlier process
            rate, wait, seconds = finished.images_per_s, finished.data_wait, finished.seconds
        return FitSummary(
            folder=str(self.folder),
            steps=self.step,
            epochs=self._epoch(),
            top1=last.get("top1", -1.0),
            ema_top1=last.get("ema_top1", -1.0),
            best=-1.0 if self.record is None else self.record.best(),
            images_per_s=rate,
            data_wait=wait,
            seconds=seconds,
            skipped=self.skipped,
            best_step=-1 if self.record is None else self.record.best_step(),
        )


def _read_summary(folder: Path) -> FitSummary | None:
    try:
        return FitSummary(**json.loads((folder / "summary.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _unfit(folder: Path, error: Exception) -> IntegrityError:
    """The error for a checkpoint that is undamaged but not of such a run."""
    got = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return IntegrityError(f"{folder} holds no state of this run", got=got, remedy="Resume from another checkpoint.")


def _what_to_try(config: TrainConfig, precision: torch.dtype) -> str:
    """Advice after a loss that is not finite: only what this run has not tried yet."""
    tries = ["a lower optimizer.lr", "a longer schedule.warmup_epochs"]
    clip = config.optimizer.clip_grad
    if clip is None or clip > 1:
        tries.append("optimizer.clip_grad=1")
    if precision != torch.float32:
        tries.append("run.precision=float32")
    advice = f"try {', '.join(tries[:-1])} or {tries[-1]}."
    older = checkpoints(Path(config.run.out))
    if not older:
        return f"No checkpoint was saved before. Start again and {advice}"
    allowed = max(3, 2 * config.run.skip_non_finite)
    return (
        f"{older[0]} is kept: --resume auto run.skip_non_finite={allowed} continues from there and skips up to "
        f"{allowed} such steps in a row. Or start in a new run.out, perhaps with model.weights= of it, and {advice}"
    )
