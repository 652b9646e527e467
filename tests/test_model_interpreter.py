"""Models on Triton's kernels, in its interpreter."""

from __future__ import annotations

from interpreter import passed


def test_a_tiny_model_learns_on_the_triton_backend():
    """A batch of eight, both heads to zero error."""
    assert passed("triton and by_heart", "test_model_compile_export.py", timeout=280) == 1


def test_a_nan_stays_visible_on_the_triton_backend():
    assert passed("triton and stays_visible", "test_model_scan.py", timeout=120) == 2


def test_half_precision_on_the_triton_backend():
    assert passed("triton and half_precision_is_near", "test_model_other_tools.py", timeout=280) == 6
