"""No more threads than this process may use cores: affinity, and the quotas of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from labeler.base.cores import usable_cores

PINNED = """
import os, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import ray, torch
from labeler import LabelerConfig, TeacherConfig, label_images
from labeler.ray_executor import _connect
from labeler.base.runtime import rank_threads, set_threads

images, store = sys.argv[1:]
label_images(images, store, LabelerConfig(TeacherConfig("tiny:colour_teacher"), decoder="pil", progress=False))
labeling = torch.get_num_threads()
ray.init = lambda **settings: print(labeling, settings["num_cpus"], rank_threads(), set_threads(None))
_connect(None, 1)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to cores")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this process has one core only")
def test_a_process_that_is_pinned_to_one_core_uses_one(images, tmp_path):
    """The labeler's threads, the cores that a private Ray is told of, the loader's threads, and training's."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PINNED, str(images), str(tmp_path / "labels")],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"] * 4


def system(folder: Path, groups: str, **files: str) -> Path:
    """A folder like / with the control groups of a process; files: their path below /sys/fs/cgroup, as __ for /."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = (
            folder / "sys/fs/cgroup" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs", "cpu.cfs")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


V1 = "5:memory:/a\n4:cpu,cpuacct:/docker/b\n1:name=systemd:/\n"
CASES = {
    # groups of the process, files, and the cores of 16 that may be used
    "version 2": ("0::/\n", {"cpu_max": "200000 100000\n"}, 2),
    "part of a core more": ("0::/\n", {"cpu_max": "250000 100000\n"}, 3),
    "less than a core": ("0::/\n", {"cpu_max": "10000 100000\n"}, 1),
    "no limit": ("0::/\n", {"cpu_max": "max 100000\n"}, 16),
    "of a group above": (
        "0::/slurm/job/step\n",
        {"slurm__cpu_max": "300000 100000", "slurm__job__cpu_max": "max 1"},
        3,
    ),
    "of two": ("0::/a/b\n", {"a__cpu_max": "300000 100000", "a__b__cpu_max": "500000 100000"}, 3),
    "more than there are": ("0::/\n", {"cpu_max": "6400000 100000"}, 16),
    "version 1": (V1, {"cpu__docker__b__cfs_quota_us": "400000", "cpu__docker__b__cfs_period_us": "100000"}, 4),
    "version 1, seen from inside": (V1, {"cpu__cfs_quota_us": "400000\n", "cpu__cfs_period_us": "100000\n"}, 4),
    "version 1, no limit": (V1, {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}, 16),
    "damaged": ("0::/\n", {"cpu_max": "many"}, 16),
}


@pytest.mark.parametrize("case", CASES)
def test_a_containers_quota_counts(tmp_path, monkeypatch, case):
    groups, files, cores = CASES[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert usable_cores(system(tmp_path, groups, **files)) == cores


def test_without_control_groups_affinity_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert usable_cores(tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(tmp_path) == (os.cpu_count() or 1)
