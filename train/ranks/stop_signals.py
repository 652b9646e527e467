"""SIGTERM and SIGINT as a flag that the training loop checks between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Context in which the first signal only sets `requested`; a second SIGINT has its previous effect.

    Attributes:
        requested: name of the signal; None: there was none.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if self.requested and number == signal.SIGINT:
            if callable(before):
                before(number, frame)
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
