"""Optimizer and learning rate of a recipe, made with timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn

from labeler.base.errors import InputError, did_you_mean
from train.recipes.config import OptimizerConfig, ScheduleConfig

MANY_CYCLES = 1000
# Arguments of torch's optimizers that say how a step is computed, and where its number is counted.
HOW = ("fused", "capturable", "foreach")
LOOKAHEAD = "lookahead_"


def build_optimizer(net: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Create the optimizer. On a GPU it is fused where torch has that, and else counts its steps on the device.

    Args:
        net: the network, on its device.
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
        optimizer = _create(net, config, extra)
        if next(net.parameters()).is_cuda and (how := _how_on_gpu(optimizer)):
            optimizer = _create(net, config, extra | how)
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"optimizer {config.name!r} does not accept these settings", got=error) from None
    if config.decay_all:
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay
    return optimizer


def _create(net: nn.Module, config: OptimizerConfig, extra: Mapping[str, Any]) -> torch.optim.Optimizer:
    return create_optimizer_v2(
        net,
        opt=config.name,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        filter_bias_and_bn=not config.decay_all,
        layer_decay=config.layer_decay,
        **extra,
    )


def _how_on_gpu(optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    """Arguments with which a step does not wait for the GPU, where torch's and timm's optimizers have them."""
    known = optimizer.defaults
    return {"fused": True} if "fused" in known else {"capturable": True} if "capturable" in known else {}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer.state_dict()` returned, on this device or another.

    Args:
        optimizer: the optimizer; it computes its steps as before, not as the one that the state is from.
        state: the state.

    Raises:
        LookupError: it is not the state of an optimizer; torch raises ValueError if it is that of another one.
    """
    own = [{key: group[key] for key in HOW if key in group} for group in optimizer.param_groups]
    groups = [{**group, **how} for group, how in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})


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
        self._constant, self._power = config.kind == "constant", config.power if config.kind == "poly" else None
        self._base, self._lowest = list(self._scheduler.base_values), config.min_lr

    def set(self, step: int) -> float:
        """Set the rates for the step that follows `step` others. Returns the highest rate of all groups."""
        if self._constant and step >= self._scheduler.warmup_t:
            self._scheduler.update_groups(self._base)
        elif step >= self._cosine_steps and not self._constant:
            self._scheduler.update_groups(self._lowest)
        elif self._power is not None and step >= self._scheduler.warmup_t:
            left = (1 - step / self._cosine_steps) ** self._power
            self._scheduler.update_groups([self._lowest + (base - self._lowest) * left for base in self._base])
        else:
            self._scheduler.step_update(step)
        return max(group["lr"] for group in self._optimizer.param_groups)


def total_steps(config: ScheduleConfig, epoch_steps: int) -> int:
    """Steps of the whole run, with `epoch_steps` steps per epoch."""
    return config.steps or max(1, round((config.epochs + config.cooldown_epochs) * epoch_steps))
