"""The benchmark of building targets compares like with like: both of its sides build the same ones."""

from __future__ import annotations

import pytest

from scripts.benchmark.suites.targets_suite import CODED, TAIL, TOLERANCE, TargetInputs, largest_difference, stored_rows


@pytest.mark.parametrize("palette", [8, 32])
def test_both_sides_build_the_same_targets(palette):
    assert TOLERANCE <= 1e-4
    assert largest_difference(TargetInputs(8, palette)) <= TOLERANCE


def test_rows_of_a_store_are_decoded_into_targets_with_a_tail(tmp_path):
    rows, host = stored_rows(tmp_path / "store", 2, palette=64, side=9, device="cpu")
    maps = rows.decode(host)
    assert maps.scores.shape == (2, 64, 9, 9)
    assert maps.tail_classes.shape == (2, TAIL)
    assert (maps.scores == maps.background[:, None]).float().mean() == pytest.approx(1 - CODED, abs=0.05)
