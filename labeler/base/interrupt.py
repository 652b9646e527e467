"""Handles Ctrl-C while a program starts, with one line of output.

Python would raise KeyboardInterrupt inside whatever is being imported: a long traceback, or an abort where a library's
C++ code is interrupted. At that time there is nothing to save, so the process just ends.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import NoReturn

INTERRUPTED = 130  # the exit status that shells report after Ctrl-C


def end_at_interrupt() -> None:
    """Makes Ctrl-C end this process at once, until another handler is set. For programs, not for libraries."""
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    os._exit(INTERRUPTED)
