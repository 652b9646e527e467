"""An optimizer's step that the device takes or leaves out, without the host knowing which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from train.step.rollback import Rollback

Unmoved = tuple[str, list[int]]


class LateUpdate:
    """Steps an optimizer, and takes the step back where it was not wanted.

    torch's fused optimizers skip such a step themselves. For all others weights and state are copied before, and put
    back after it.

    Args:
        optimizer: the optimizer; it has done a step before.
        averages: further tensors that a step changes: the moving average.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, averages: Iterable[torch.Tensor]) -> None:
        self._optimizer: Any = optimizer
        self._skips = skips_by_itself(optimizer)
        self._updated = len(_updated(optimizer))
        weights = [] if self._skips else _updated(optimizer)
        state = [] if self._skips else [value for values in optimizer.state.values() for value in values.values()]
        self._kept = Rollback([*weights, *state, *averages])

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, before: Unmoved, averages: Iterable[torch.Tensor]
    ) -> LateUpdate | None:
        """Create the update after a step of the optimizer.

        Args:
            optimizer: the optimizer.
            before: `unmoved` before that step.
            averages: see the class.

        Returns:
            The update; None: the step changed something else than numbers on the device.
        """
        on_device = all(
            isinstance(value, torch.Tensor) and value.device == parameter.device
            for parameter, values in optimizer.state.items()
            for value in values.values()
        )
        return cls(optimizer, averages) if on_device and unmoved(optimizer) == before else None

    def fits(self) -> bool:
        """Whether the same number of parameters as before have a gradient."""
        return len(_updated(self._optimizer)) == self._updated

    def run(self, bad: torch.Tensor, average: Callable[[], None]) -> None:
        """Do the step.

        Args:
            bad: bool without dimensions, on the device: take it back.
            average: updates the moving average.
        """
        self._kept.save()
        if self._skips:
            self._optimizer.grad_scale, self._optimizer.found_inf = None, bad.float()
        try:
            self._optimizer.step()
        finally:
            if self._skips:
                del self._optimizer.grad_scale, self._optimizer.found_inf
        average()
        self._kept.put_back_if(bad)


def unmoved(optimizer: torch.optim.Optimizer) -> Unmoved:
    """What a step leaves as it is if all that it changes are numbers on the device.

    Returns:
        What the groups hold beside parameters, as text, and the identity of each part of the state. The first step
        makes the state; some optimizers replace it in each step, or count their steps on the host.
    """
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return repr(groups), [id(value) for values in optimizer.state.values() for value in values.values()]


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer leaves out a step whose `found_inf` is 1."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _updated(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters that have a gradient."""
    return [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
