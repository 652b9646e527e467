"""How fast a run goes, and how much of its time it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.batch import Batch


class Speed:
    """Seconds of training steps and of waiting for their batches; `step_images` of all ranks go into a step."""

    def __init__(self, step_images: int) -> None:
        self._images, self._began = step_images, time.perf_counter()
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._told = (0, 0.0, 0.0)
        self._pause = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; what happens between two of them counts as the first one's step."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            came, self._pause = time.perf_counter(), 0.0
            yield batch
            self._steps += 1
            self._waited += came - asked
            self._seconds += time.perf_counter() - asked - self._pause

    @property
    def steps(self) -> int:
        """That this process has done."""
        return self._steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within does not count."""
        started = time.perf_counter()
        yield
        self._pause += time.perf_counter() - started

    def since_last(self) -> tuple[float, float]:
        """Images per second and share of waiting, since this was asked before."""
        now = self._steps, self._seconds, self._waited
        steps, seconds, waited = (new - old for new, old in zip(now, self._told, strict=True))
        self._told = now
        return self._rates(int(steps), seconds, waited)

    def overall(self) -> tuple[float, float]:
        return self._rates(self._steps, self._seconds, self._waited)

    def seconds(self) -> float:
        """Since the beginning, everything included."""
        return time.perf_counter() - self._began

    def _rates(self, steps: int, seconds: float, waited: float) -> tuple[float, float]:
        return (steps * self._images / seconds, waited / seconds) if seconds else (0.0, 0.0)
