"""The losses of the steps since the last row of metrics, and the steps that were skipped."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train.errors import NonFiniteError
from train.recipes.config import TrainConfig
from train.record.checkpoint_folders import checkpoints
from train.step.step_result import StepResult

log = logging.getLogger("train")


class StepLosses:
    """Sums up losses, and stops a run whose loss or gradient is not finite for too many steps in a row.

    Args:
        config: the recipe.
        precision: of the forward pass.

    Attributes:
        skipped: steps of the whole run that were skipped.
    """

    def __init__(self, config: TrainConfig, precision: torch.dtype) -> None:
        self._config, self._precision = config, precision
        self.skipped = self._bad_in_a_row = self._steps = 0
        self._sum = 0.0

    def add(self, result: StepResult, step: int) -> None:
        """Add a step.

        Args:
            result: its result.
            step: number of steps with this one.

        Raises:
            NonFiniteError: more than `run.skip_non_finite` steps in a row were not finite.
        """
        if result.done:
            self._bad_in_a_row = 0
            self._sum, self._steps = self._sum + result.loss, self._steps + 1
            return
        self._bad_in_a_row, self.skipped = self._bad_in_a_row + 1, self.skipped + 1
        bad = f"loss {result.loss}, gradient norm {result.norm}"
        if self._bad_in_a_row > self._config.run.skip_non_finite:
            raise NonFiniteError(
                f"loss or gradient is not finite at step {step}", got=bad,
                remedy=_what_to_try(self._config, self._precision),
            )  # fmt: skip
        log.warning("step %d skipped: %s (%d in a row)", step, bad, self._bad_in_a_row)

    def take_mean(self) -> float | None:
        """The mean loss since the last call; None: every step was skipped."""
        mean = self._sum / self._steps if self._steps else None
        self._sum, self._steps = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {
            "loss_sum": self._sum,
            "loss_steps": self._steps,
            "bad_in_a_row": self._bad_in_a_row,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict()` returned. Raises LookupError if it is something else."""
        self.skipped, self._bad_in_a_row = state["skipped"], state["bad_in_a_row"]
        self._sum, self._steps = state["loss_sum"], state["loss_steps"]


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
        f"{older[0]} is kept: `resume=auto` run.skip_non_finite={allowed} continues from there and skips up to "
        f"{allowed} such steps in a row. Or start in a new run.out, perhaps with model.weights= of it, and {advice}"
    )
