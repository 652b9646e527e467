"""Training speed, and the share of time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.batch import Batch


class Speed:
    """Measures the time of training steps and of waiting for their batches.

    Args:
        step_images: images per step, over all ranks.
    """

    def __init__(self, step_images: int) -> None:
        self._images, self._began = step_images, time.perf_counter()
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._last = (0, 0.0, 0.0)
        self._pause = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; the time until the next one is requested counts as the step of this one."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            arrived, self._pause = time.perf_counter(), 0.0
            yield batch
            self._steps += 1
            self._waited += arrived - start
            self._seconds += time.perf_counter() - start - self._pause

    @property
    def steps(self) -> int:
        """Steps done in this process."""
        return self._steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent in this context."""
        start = time.perf_counter()
        yield
        self._pause += time.perf_counter() - start

    def since_last(self) -> tuple[float, float]:
        """Images per second and share of waiting since the previous call."""
        now = self._steps, self._seconds, self._waited
        steps, seconds, waited = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        return self._rates(int(steps), seconds, waited)

    def overall(self) -> tuple[float, float]:
        """Images per second and share of waiting, of all steps of this process."""
        return self._rates(self._steps, self._seconds, self._waited)

    def seconds(self) -> float:
        """Seconds since this object was created, everything included."""
        return time.perf_counter() - self._began

    def _rates(self, steps: int, seconds: float, waited: float) -> tuple[float, float]:
        return (steps * self._images / seconds, waited / seconds) if seconds else (0.0, 0.0)
