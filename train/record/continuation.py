"""Checks whether a run may continue from a checkpoint with other settings or on other ranks."""

from __future__ import annotations

import logging
from typing import Any

import torch

from labeler.base.errors import MismatchError
from pipeline import TokenLabelLoader
from train.optimization import LearningRate, total_steps
from train.ranks.distributed import Ranks
from train.recipes.config import BEGINNING, TrainConfig, keys_that_affect
from train.recipes.recipe import flat, parse_config
from train.record.checkpoint import CheckpointInfo

log = logging.getLogger("train")

REMEDY = "Resume with the settings that it was saved with, or start from its weights with model.weights=…."


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """`section.key` -> (old, new) for all settings that differ and affect values or their rounding."""
    before, after = flat(old), flat(new)
    for one in (before, after):
        one["model.args"] = {key: value for key, value in one["model.args"].items() if key not in BEGINNING}
    names = keys_that_affect("values", "rounding")
    return {key: (before.get(key), after[key]) for key in after if key in names and before.get(key) != after[key]}


def refuse_other_run(config: TrainConfig, info: CheckpointInfo, ranks: Ranks) -> None:
    """Raise an error unless the checkpoint was made by the same recipe.

    Logs a warning if rounding or the number of ranks differ. The schedule is checked in `refuse_other_past`, when the
    number of steps per epoch is known.

    Args:
        config: the recipe to continue with.
        info: the checkpoint's record.
        ranks: the ranks that train together.

    Raises:
        MismatchError: the recipes differ.
    """
    changed = differences(_config_of(info), config)
    rounding = {name: changed.pop(name) for name in keys_that_affect("rounding") & changed.keys()}
    changed = {name: values for name, values in changed.items() if not name.startswith("schedule.")}
    if changed:
        raise MismatchError(
            "the checkpoint belongs to another run",
            got=", ".join(f"{name} {new}" for name, (_, new) in changed.items()),
            expected=", ".join(f"{name} {old}" for name, (old, _) in changed.items()),
            remedy=REMEDY,
        )
    if not ranks.first:
        return
    for name, (old, new) in rounding.items():
        log.warning("resumed with %s=%s instead of %s: not the same to the last bit", name, new, old)
    if info.world_size != ranks.world_size:
        log.warning(
            "resumed on %d ranks instead of %d: every step sees the same images, but their crops and partners are "
            "different, and BatchNorm sees other parts of the batch",
            ranks.world_size, info.world_size,
        )  # fmt: skip


def refuse_other_classes(loader: TokenLabelLoader, info: CheckpointInfo) -> None:
    """Raise an error if the class head would be of other classes, or of as many others, than in the checkpoint.

    Args:
        loader: the training batches.
        info: the checkpoint's record.

    Raises:
        MismatchError: the classes differ.
    """

    def text(count: int, aux_count: int | None) -> str:
        return f"{count:,} of the {'teacher' if aux_count is None else 'images'}"

    ours, saved = text(loader.num_classes, loader.aux_classes), text(info.num_classes, info.aux_classes)
    if loader.samples.store is not None and ours != saved:
        raise MismatchError("the checkpoint has other classes", got=ours, expected=saved, remedy=REMEDY)


def refuse_other_past(config: TrainConfig, info: CheckpointInfo, epoch_steps: int) -> None:
    """Raise an error if another schedule would not have led to this checkpoint.

    The usual case is a longer run: at a constant rate, in cycles, or with a longer cooldown. A single cosine of another
    length has other rates from the start.

    Args:
        config: the recipe to continue with.
        info: the checkpoint's record.
        epoch_steps: steps per epoch.

    Raises:
        MismatchError: a learning rate or a temperature so far would have been different, or the new schedule is over.
    """
    old = _config_of(info)
    changed = [name for name in differences(old, config) if name.startswith("schedule.")]
    if not changed:
        return
    given = ", ".join(f"{name} {flat(config)[name]}" for name in changed)
    saved = ", ".join(f"{name} {flat(old)[name]}" for name in changed)
    steps = total_steps(config.schedule, epoch_steps)
    if steps < info.step:
        raise MismatchError(
            "the checkpoint is beyond the end of this schedule", got=f"step {info.step:,}", expected=f"up to {steps:,}"
        )
    before, after = _past(old, info.step, epoch_steps), _past(config, info.step, epoch_steps)
    first = next((step for step in range(info.step) if before[step] != after[step]), None)
    if first is not None:
        raise MismatchError(
            f"this schedule differs before the checkpoint, from step {first + 1:,} on", got=given, expected=saved,
            remedy="A run can be extended with schedule.kind constant or restarts, or with more "
            f"schedule.cooldown_epochs. {REMEDY}",
        )  # fmt: skip
    log.info("%s instead of %s: the %s steps so far stay valid, the run ends at step %s", given, saved,
             f"{info.step:,}", f"{steps:,}")  # fmt: skip


def _past(config: TrainConfig, steps: int, epoch_steps: int) -> list[tuple[float, float]]:
    """Learning rate and temperature of each of the first steps."""
    total = total_steps(config.schedule, epoch_steps)
    rate = LearningRate(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr), config.schedule, epoch_steps
    )
    return [(rate.set(step), config.loss.temperature_at(step, total)) for step in range(steps)]


def _config_of(info: CheckpointInfo) -> TrainConfig:
    return parse_config(info.config, "the checkpoint")
