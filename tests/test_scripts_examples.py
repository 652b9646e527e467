"""The example for projects that do not install this package reads what the package reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from labeler import LabelStore
from scripts.read_with_h5py import read_row

SCRIPT = Path(__file__).parents[1] / "scripts" / "read_with_h5py.py"


def test_h5py_alone_reads_the_same_probabilities(store):
    labels = LabelStore(store)
    for row in (0, 7, 11):
        key, classes, p, _ = read_row(store, labels.keys[row])
        assert key == labels.keys[row]
        np.testing.assert_allclose(p, labels.read([row]).dense()[0][classes], rtol=1e-4)
    with pytest.raises(KeyError):
        read_row(store, "class9/nothing.jpg")


def test_the_example_runs_without_the_package(store, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"import runpy, sys; sys.argv[1:] = [{str(store)!r}]; sys.modules['labeler'] = None;"
         f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4×4 cells" in done.stdout
