"""What SIGINT (Ctrl-C) and SIGTERM do, in one place for all programs.

While a program starts, and in commands with nothing to save, Ctrl-C ends it with one line (`end_at_interrupt`). Python
would raise KeyboardInterrupt inside whatever is running: a long traceback, or an abort where a library's C++ code is
interrupted. Later the labeler stops at once, as its finished shards are safe, and training finishes its step and saves
(`StopSignals`). Ray replaces handlers when it starts (`handlers_kept`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

INTERRUPTED = 130  # the exit status that shells report after Ctrl-C
STOPPED = 143  # the exit status that shells report after SIGTERM: stopped, with everything saved
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
unfinished_files: set[Path] = set()  # of this process, removed when Ctrl-C ends it


def end_at_interrupt() -> None:
    """Makes Ctrl-C end this process at once, until another handler is set. For programs, not for libraries."""
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    for path in list(unfinished_files):
        with suppress(OSError):
            path.unlink()
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    os._exit(INTERRUPTED)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restores the handlers of both signals at the end; only the main thread can, elsewhere it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class StopSignals:
    """Context in which the first signal only sets `requested`; a second SIGINT has its previous effect.

    Attributes:
        requested: Name of the signal; None: there was none.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
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
