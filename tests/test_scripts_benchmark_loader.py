"""The loader's benchmark compares like with like: both of its sides build the same targets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmark_loader import compare_targets

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("palette", [8, 32])
def test_both_sides_build_the_same_targets(palette):
    found = compare_targets(batch=8, palette=palette, calls=3)
    assert found["difference"] <= 1e-4
    assert sorted(found["ms"]) == ["ours", "rival"]
    assert all(len(values) == 3 for values in found["ms"].values())


def test_the_command_line_explains_itself():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmark_loader", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--store" in done.stdout
    assert "--side" not in done.stdout, "the sides are started by the script itself"
