"""The published models on Triton's kernels, in its interpreter, which needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("test_model_mixer.py", "test_model_demansia.py", "test_model_vim.py", "test_model_scan.py")


@pytest.mark.timeout(900)
def test_fixtures_hold_on_the_triton_backend():
    """Outputs, intermediates and gradients, at the tolerances that the other backends keep."""
    from fixtures import tensors

    tensors("demansia_micro")  # skips where the fixtures are not at hand
    chosen = "triton and (published or fixture)"
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, "-p", "no:cacheprovider", *FILES]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 15
