"""Tests that run again in Triton's interpreter, which needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def passed(chosen: str, *files: str, timeout: float) -> int:
    """How many of the chosen tests passed in the interpreter; none may fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:]
    return int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
