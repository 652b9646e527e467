"""The examples run as a user would run them: outside the clone, in a process of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import make_images

from examples.read_with_h5py import read_row
from labeler import LabelStore

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    """For what the tests start: threads on more cores would wait for those that other work holds, ten times as long."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def run(script: Path, *arguments: object, at: Path) -> str:
    """What a script prints, run in another folder."""
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg"}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_h5py_alone_reads_the_same_probabilities(store):
    labels = LabelStore(store)
    for row in (0, 7, 11):
        key, classes, p, _ = read_row(store, labels.keys[row])
        assert key == labels.keys[row]
        np.testing.assert_allclose(p, labels.read([row]).dense()[0][classes], rtol=1e-4)
    with pytest.raises(KeyError):
        read_row(store, "class9/nothing.jpg")


def test_read_with_h5py_runs_without_the_package(store, tmp_path):
    script, example = tmp_path / "without_the_package.py", str(EXAMPLES / "read_with_h5py.py")
    hide = "import runpy, sys; sys.modules['labeler'] = None; "
    script.write_text(hide + f"runpy.run_path({example!r}, None, '__main__')")
    assert "4×4 cells" in run(script, store, at=tmp_path)


def test_read_labels_tells_of_a_row(store, tmp_path):
    labels = LabelStore(store)
    told = run(EXAMPLES / "read_labels.py", store, labels.keys[3], at=tmp_path).splitlines()
    assert told[0].startswith("LabelStore(")
    assert told[1].startswith(f"{labels.keys[3]}: 4×4 cells")
    assert [[int(number) for number in line.split()] for line in told[2:6]] == labels.read([3]).top1()[0].tolist()
    assert run(EXAMPLES / "read_labels.py", store, at=tmp_path).splitlines()[1].startswith(labels.keys[0])


def test_own_teacher_labels_and_a_timm_backbone_learns_from_it(tmp_path):
    images = make_images(tmp_path / "images", 12, 3)
    run(EXAMPLES / "own_teacher.py", images, tmp_path / "labels", at=tmp_path)
    labels = LabelStore(tmp_path / "labels")
    assert (len(labels), labels.meta.num_classes, labels.meta.grid) == (12, 10, (8, 8))
    told = run(EXAMPLES / "train_timm_backbone.py", images, tmp_path / "labels", "resnet10t", 8, at=tmp_path)
    losses = [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", told)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert (tmp_path / "backbone.pt").is_file()


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    """Its code, run as one script: a kernel would bring two dozen packages."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "outputs are not committed"
    script = tmp_path / "cells.py"
    script.write_text("\n".join([f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}", *code]))
    told = run(script, at=tmp_path)
    first, last = map(float, re.search(r"loss (\S+) at the first step, (\S+) at the last", told).groups())
    assert last < first / 2
    assert int(re.search(r"(\d+)% of the tokens are right", told)[1]) > 60


def test_a_detector_of_torchvision_trains_and_answers_on_a_pyramid(tmp_path):
    printed = run(EXAMPLES / "detection.py", at=tmp_path)
    assert re.search(r"loss \d+\.\d+: .*loss_mask", printed)
    assert re.search(r"objects, masks \(\d+, 1, 128, 160\)", printed)
