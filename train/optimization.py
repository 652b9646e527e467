"""Optimizer and learning rate of a recipe, made with timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn

from labeler.base.errors import InputError, did_you_mean
from train.recipes.config import OptimizerConfig, ScheduleConfig

MANY_CYCLES = 1000
LOOKAHEAD = "lookahead_"


def build_optimizer(net: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Create the optimizer.

    Args:
        net: the network.
        config: the recipe's section `optimizer`. The prefix `lookahead_` of a name wraps the optimizer in Lookahead.

    Returns:
        The optimizer.

    Raises:
        InputError: timm does not know the optimizer, or it does not accept the settings.
    """
    names = list_optimizers()
    if config.name.removeprefix(LOOKAHEAD) not in names:
        remedy = did_you_mean(config.name, names, or_all=True)
        raise InputError("unknown optimizer.name", got=repr(config.name), remedy=remedy)
    extra: dict[str, Any] = {}
    if config.betas is not None:
        extra["betas"] = config.betas
    if config.eps is not None:
        extra["eps"] = config.eps
    try:
        optimizer = create_optimizer_v2(
            net,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=not config.decay_all,
            layer_decay=config.layer_decay,
            **extra,
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"optimizer {config.name!r} does not accept these settings", got=error) from None
    if config.decay_all:
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay
    return optimizer


def refuse_too_few_steps(config: ScheduleConfig, epoch_steps: int) -> None:
    """Raise InputError if warm-up and cooldown use up all of `schedule.steps`."""
    others = config.warmup_epochs + config.cooldown_epochs
    if config.steps is not None and config.steps / epoch_steps <= others:
        raise InputError(
            "schedule.steps is too small for warm-up and cooldown",
            got=f"{config.steps} steps, {epoch_steps} per epoch",
            expected=f"more than {others * epoch_steps:g}",
        )


class LearningRate:
    """Sets the learning rate of all parameter groups before each step; it depends only on the step's number.

    Args:
        optimizer: the optimizer.
        config: the recipe's section `schedule`.
        epoch_steps: steps per epoch.

    Raises:
        InputError: warm-up and cooldown use up all of `schedule.steps`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, epoch_steps: int) -> None:
        refuse_too_few_steps(config, epoch_steps)
        epochs = config.epochs
        if config.steps is not None:
            epochs = config.steps / epoch_steps - config.cooldown_epochs
        length = config.first_cycle if config.kind == "restarts" else epochs
        self._optimizer = optimizer
        self._scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(1, round(length * epoch_steps)),
            lr_min=config.min_lr,
            cycle_mul=config.cycle_factor if config.kind == "restarts" else 1.0,
            cycle_limit=MANY_CYCLES if config.kind == "restarts" else 1,
            warmup_t=round(config.warmup_epochs * epoch_steps),
            warmup_lr_init=config.warmup_lr,
            t_in_epochs=False,
        )
        self._cosine_steps = round(epochs * epoch_steps)
        self._constant = config.kind == "constant"
        self._base, self._lowest = list(self._scheduler.base_values), config.min_lr

    def set(self, step: int) -> float:
        """Set the rates for the step that follows `step` others. Returns the highest rate of all groups."""
        if self._constant and step >= self._scheduler.warmup_t:
            self._scheduler.update_groups(self._base)
        elif step >= self._cosine_steps and not self._constant:
            self._scheduler.update_groups(self._lowest)
        else:
            self._scheduler.step_update(step)
        return max(group["lr"] for group in self._optimizer.param_groups)


def total_steps(config: ScheduleConfig, epoch_steps: int) -> int:
    """Steps of the whole run, with `epoch_steps` steps per epoch."""
    return config.steps or max(1, round((config.epochs + config.cooldown_epochs) * epoch_steps))
