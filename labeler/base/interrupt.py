"""Ctrl-C while a program starts, in one line.

Python would raise KeyboardInterrupt inside whatever is being imported: a long traceback, or an abort where a library's
C++ code is interrupted. At that time nothing is there to be saved, so the process just ends.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import NoReturn

INTERRUPTED = 130  # what shells give a program that Ctrl-C ended


def end_at_interrupt() -> None:
    """From here on Ctrl-C ends this process at once, until somebody else takes the signal. For programs alone."""
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    os._exit(INTERRUPTED)
