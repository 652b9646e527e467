"""Errors of several ranks: the first rank's line is the one that is shown."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from labeler.base.command_line import shown
from labeler.base.errors import TokenLabelError

HEAD_START_S = 2.0


def first_rank_first(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Let the first rank fail first: most errors occur in all ranks, and a launcher then ends the others."""

    def run_then_wait(options: argparse.Namespace) -> int:
        try:
            return run(options)
        except TokenLabelError as error:
            if os.environ.get("RANK", "0") != "0":
                time.sleep(HEAD_START_S)
            _write_torchrun_error(shown(error, options))
            raise

    return run_then_wait


def _write_torchrun_error(text: str) -> None:
    """Write the line that torchrun shows as the cause in its summary, to the file and in the form that it expects."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        detail = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": detail}}))
