"""Models on Triton's kernels, in its interpreter, which needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FULL

HERE = Path(__file__).parent
FILES = ("test_model_mixer.py", "test_model_demansia.py", "test_model_vim.py", "test_model_scan.py")


def passed(chosen: str, *files: str, timeout: float) -> int:
    """How many of the chosen tests passed in the interpreter; none may fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:]
    return int(done.stdout.rsplit(" passed", 1)[0].split()[-1])


@pytest.mark.timeout(900)
def test_fixtures_hold_on_the_triton_backend():
    """Outputs, intermediates and gradients, at the tolerances that the other backends keep.

    The longest ones only with FAULTS=full: other tests compare the kernels at those lengths with a float64 loop.
    """
    without = "" if FULL else " and not dtype1 and not 197 and not (test_model_vim and gradients)"
    assert passed(f"triton and (published or fixture){without}", *FILES, timeout=850) >= (15 if FULL else 12)


def test_a_tiny_model_learns_on_the_triton_backend():
    """A batch of eight, both heads to zero error."""
    assert passed("triton and by_heart", "test_model_compile_export.py", timeout=280) == 1


def test_a_nan_stays_visible_on_the_triton_backend():
    assert passed("triton and stays_visible", "test_model_scan.py", timeout=120) == 2


def test_half_precision_on_the_triton_backend():
    assert passed("triton and half_precision_is_near", "test_model_other_tools.py", timeout=280) == 6
