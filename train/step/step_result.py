"""The figures of a training step: on their way from the device, and waited for when they are read."""

from __future__ import annotations

import math

import torch


class StepResult:
    """Result of a training step. On a GPU, reading any of it waits until the device has done the step.

    Args:
        values: float64 [3] on the device: sum of the losses of all ranks, ranks that were asked to stop, gradient norm.
        ranks: number of ranks.
        scaled: the step was skipped only because a float16 gradient overflowed, and the loss scale was reduced.
    """

    def __init__(self, values: torch.Tensor, ranks: int = 1, scaled: bool = False) -> None:
        self._ranks, self._scaled, self._host = ranks, scaled, values
        self._read: list[float] | None = None
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda and torch.cuda.is_available():
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def loss(self) -> float:
        """Mean loss over the images of all ranks."""
        return self._values()[0] / self._ranks

    @property
    def norm(self) -> float:
        """Norm of the gradients before clipping."""
        return self._values()[2]

    @property
    def done(self) -> bool:
        """False: the step was skipped."""
        return self._scaled or (math.isfinite(self.loss) and math.isfinite(self.norm))

    @property
    def stop(self) -> bool:
        """Whether some rank was asked to stop."""
        return self._values()[1] > 0

    def _values(self) -> list[float]:
        if self._read is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._read = self._host.tolist()
        return self._read
