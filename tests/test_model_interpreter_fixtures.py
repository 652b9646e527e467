"""Fixtures on Triton's kernels, in its interpreter: a file of its own, so that another worker can run it."""

from __future__ import annotations

import pytest
from faults import FULL
from interpreter import passed

FILES = ("test_model_mixer.py", "test_model_demansia.py", "test_model_vim.py", "test_model_scan.py")


@pytest.mark.timeout(900)
def test_fixtures_hold_on_the_triton_backend():
    """Outputs, intermediates and gradients, at the tolerances that the other backends keep.

    The longest ones only with FAULTS=full: other tests compare the kernels at those lengths with a float64 loop.
    """
    without = "" if FULL else " and not dtype1 and not 197 and not (test_model_vim and gradients)"
    assert passed(f"triton and (published or fixture){without}", *FILES, timeout=850) >= (15 if FULL else 12)
