"""The benchmark of building targets compares like with like: both of its sides build the same ones."""

from __future__ import annotations

import pytest

from scripts.benchmark.targets_suite import TOLERANCE, TargetInputs, largest_difference


@pytest.mark.parametrize("palette", [8, 32])
def test_both_sides_build_the_same_targets(palette):
    assert TOLERANCE <= 1e-4
    assert largest_difference(TargetInputs(8, palette)) <= TOLERANCE
