"""Progress of a run on stderr: its settings, its steps and its evaluations."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from model.token_heads import TokenLabelHeads
from pipeline import TokenLabelLoader
from train.ranks.distributed import Ranks
from train.recipes.config import TrainConfig
from train.record.fit_summary import TITLES
from train.segmentation.evaluate import MaskedImages

log = logging.getLogger("train")

# Short: on 80 columns tqdm cuts off the rest, even in the middle of a number.
BAR = "step {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class Progress:
    """Progress of the first rank; the others print nothing.

    With `wanted`, single steps are shown too: on a terminal as a bar; elsewhere, as in the log of a batch job, as a
    line every `run.log_every` steps, since a bar would become a line of megabytes.

    Args:
        wanted: show single steps.
        ranks: the ranks that train together.
        step: steps done before.
        steps: steps of the whole run.
    """

    def __init__(self, wanted: bool, ranks: Ranks, step: int, steps: int) -> None:
        self._speaks, self._wanted = ranks.first, ranks.first and wanted
        self.on_terminal = self._wanted and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, bar_format=BAR, disable=not self.on_terminal)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Count one step."""
        self._bar.update(1)

    def report_steps(self, where: str, values: Sequence[str], left: Sequence[str]) -> None:
        """Show how the latest steps went.

        Args:
            where: step and epoch.
            values: loss, learning rate and speed.
            left: remaining time, for a line; the bar shows its own.
        """
        if self.on_terminal:
            self._bar.set_postfix_str(", ".join(values))
        elif self._wanted:
            self.say(f"{where}: {', '.join([*values, *left])}")

    def say(self, line: str) -> None:
        """Print one line, above the bar or in a log."""
        if self._wanted:
            tqdm.write(line, sys.stderr)
        elif self._speaks:
            log.info("%s", line)


def opening(
    config: TrainConfig,
    net: TokenLabelHeads,
    loader: TokenLabelLoader,
    validation: TokenLabelLoader | MaskedImages | None,
    ranks: Ranks,
    precision: torch.dtype,
    steps: int,
) -> list[str]:
    """The run's settings in three lines: model; images and steps; device and output.

    Args:
        config: the recipe.
        net: the network.
        loader: the training images.
        validation: the images of the evaluation; None: no evaluation.
        ranks: the ranks that train together.
        precision: of the forward pass.
        steps: steps of the whole run.

    Returns:
        Three lines.
    """
    run, data = config.run, config.data
    sizes = [(p.numel(), p.requires_grad) for p in net.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    side, grid = config.model.img_size, loader.config.grid
    classes = f"{loader.num_classes:,} classes"
    if loader.aux_classes is not None:
        classes += f" of the images, {loader.aux_classes:,} of the teacher for the tokens"
    elif data.store is not None:
        classes += f" of the {'teacher' if loader.samples.classes.kind == 'teacher' else 'images'}"
    labels = f"token labels of {' + '.join(data.stores)}" if data.token_labels else "no token labels"
    tokens = f"{grid[0]}×{grid[1]} tokens, "
    if config.segments:
        classes, labels, tokens = f"{loader.num_classes:,} classes, {config.segmentation.decoder}", "masks", ""
    batch = f"{run.batch_size:,}"
    if run.micro_batch is not None and run.micro_batch < loader.config.batch_size:
        batch += f" ({run.micro_batch:,} at a time)"
    every = "epoch" if run.eval_every == 1 else f"{run.eval_every:,} epochs"
    tested = "no evaluation (data.validation is not set)"
    if validation is not None:
        tested = f"evaluated every {every} on {len(validation.samples):,} images"
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
    device = device if ranks.world_size == 1 else f"{ranks.world_size:,} ranks, {device}"
    average = "" if config.ema.decay is None else f", moving average {config.ema.decay:g}"
    return [
        f"{config.model.name}, {total:,} parameters{'' if trained == total else f', {trained:,} of them trained'}, "
        f"{side}×{side} pixels, {tokens}{classes}",
        f"{len(loader.samples):,} images, {labels}, {len(loader):,} steps of {batch} an epoch, {steps:,} steps; "
        f"{tested}",
        f"{device}, {str(precision).removeprefix('torch.')}; {config.optimizer.name}, lr {config.optimizer.lr:g}"
        f"{average}; {run.out}",
    ]


def evaluation_text(row: dict[str, Any], train_loss: float | None, best: float) -> list[str]:
    """The parts of an evaluation's line.

    Args:
        row: the evaluation's row of `metrics.jsonl`.
        train_loss: the latest training loss; None: unknown.
        best: best accuracy of the run so far.

    Returns:
        Losses and accuracies, as text.
    """
    parts = [] if train_loss is None else [f"train loss {train_loss:.4f}"]
    parts += [f"evaluation loss {row['loss']:.4f}"] if "loss" in row else []
    parts += [f"{title} {row[key]:.2%}" for key, title in TITLES.items() if key in row]
    parts += [f"moving average {row[key]:.2%}" for key in ("ema_top1", "ema_miou") if key in row]
    return [*parts, f"best {best:.2%}"]
