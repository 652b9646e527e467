"""Fixtures shared by the tests: small image folders, labeled stores, one Ray."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads of torch that wait for each other on busy cores give these up soon: two workers of tests share a machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny import make_images

from labeler import LabelerConfig, TeacherConfig, label_images

torch.set_num_threads(1)
# What is remembered and kept of the tests' stores does not belong among the user's.
os.environ["TOKEN_LABELING_CACHE"] = tempfile.mkdtemp(prefix="token-labeling-tests-")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="token-labeling-tests-")

SHARED = Path(__file__).parents[2] / "shared"
TINY = TeacherConfig("tiny:colour_teacher")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Torch remembers for which sizes a function was compiled; for another it compiles for any, which took minutes."""
    yield
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


@pytest.fixture
def config() -> LabelerConfig:
    """The tiny teacher on four-image shards, in this process, with PIL: a run takes a fraction of a second."""
    work = {"shard_size": 4, "batch_size": 3, "decoder": "pil", "threads": 1, "progress": False}
    return LabelerConfig(TINY, levels=160, threshold=1e-6, **work)  # finely coded, so that maps can be compared


@pytest.fixture
def store(images: Path, tmp_path: Path, config: LabelerConfig) -> Path:
    label_images(images, tmp_path / "labels", config)
    return tmp_path / "labels"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 real photographs, unpacked; the test is skipped where they are not at hand."""
    import zipfile

    archive = SHARED / "data" / "imagenet-sample-150.zip"
    if not archive.exists():
        pytest.skip(f"real photographs are not at hand ({archive.name} in {archive.parent})")
    folder = tmp_path_factory.mktemp("photographs")
    zipfile.ZipFile(archive).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """One private Ray for all tests that need one: starting it takes seconds."""
    import ray

    _start_ray()
    yield
    ray.shutdown()


@pytest.fixture
def local_ray(shared_ray: None) -> None:
    """The shared Ray, started anew where it has stopped telling this process of its actors, as it was seen to once."""
    import ray

    class Probe:
        def greet(self) -> None: ...

    probe = ray.remote(num_cpus=0)(Probe).remote()
    if not ray.wait([probe.greet.remote()], timeout=60)[0]:
        ray.shutdown()
        _start_ray()


def _start_ray() -> None:
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Two GPUs in Ray's books: it gives them out and hides the others, whether they exist or not.
    ray.init(
        address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
