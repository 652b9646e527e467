"""Labeling on a real local Ray: the same labels as in one process. What is killed there is in test_faults_labeling."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time

import numpy as np
import pytest
from labeling_runs import command, equal, start, wait_for_markers

from labeler import LabelerConfig, LabelingError, LabelStore, TeacherConfig, TeacherError, label_images, ray_executor
from labeler.base.errors import InputError
from labeler.checks.verify import verify_store
from labeler.sources.image_source import ImageSource
from labeler.worker import ShardResult, ShardTask


def on_ray(config: LabelerConfig, **changes: object) -> LabelerConfig:
    return dataclasses.replace(config, **{"workers": 2, "threads": 1, **changes})


def test_two_workers_label_what_one_process_labels(images, tmp_path, config, local_ray):
    label_images(images, tmp_path / "alone", config)
    summary = label_images(images, tmp_path / "ray", on_ray(config))
    assert summary.rows == 12
    assert equal(tmp_path / "ray", tmp_path / "alone")
    assert verify_store(tmp_path / "ray", images).problems == ()


def test_errors_that_every_worker_would_meet_end_the_run_as_themselves(images, tmp_path, config, local_ray):
    with pytest.raises(TeacherError, match="no_such_function"):
        label_images(images, tmp_path / "a", on_ray(config, teacher=TeacherConfig("tiny:no_such_function")))
    breaking = on_ray(config, teacher=TeacherConfig("tiny:teacher_that_breaks_the_store"))
    with pytest.raises(LabelingError, match="writing to the store"):
        label_images(images, tmp_path / "b", breaking)


def test_a_signal_ends_a_run_on_ray_with_143(images, tmp_path):
    store = tmp_path / "labels"
    process = start(command(images, store, "--workers", "2", "--shard-size", "1", teacher="tiny:slow_teacher"))
    wait_for_markers(store, 1, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    # The run may have been over before the signal came.
    assert process.returncode in (143, 0), error
    assert "Traceback" not in error


@pytest.mark.parametrize("greets", [False, True])
def test_a_worker_that_ray_never_tells_of_is_noticed_and_one_that_loads_slowly_is_not(
    greets, config, local_ray, monkeypatch
):
    import ray

    class Mute:  # in here, so that Ray sends its code
        """Runs, but nothing comes back from it: as where Ray's notice that it runs is lost."""

        def greet(self) -> None:
            time.sleep(0 if greets else 600)

        def prepare(self) -> None:
            time.sleep(5)

        def label(self, task: ShardTask) -> ShardResult:
            return ShardResult(task.shard, 1, 0, True)

    monkeypatch.setattr(ray_executor, "PATIENCE", 2.0)
    task = ShardTask(0, ImageSource("images", ("a.jpg",), np.array([1]), None), (-1,))
    pool = ray_executor._Pool(ray, ray.remote(Mute).remote, [task], on_ray(config), lambda _: None)
    try:
        if greets:
            assert [result.shard for result in pool.results()] == [0]
        else:
            with pytest.raises(LabelingError, match="does not report its workers to this process"):
                next(pool.results())
    finally:
        pool.close()


def test_a_run_that_ray_tells_nothing_more_connects_anew_and_goes_on(images, tmp_path, config, local_ray, monkeypatch):
    import ray

    label_images(images, tmp_path / "alone", config)
    connections: list[int] = []
    answers = iter([False])  # to the run; Ray itself asks later
    monkeypatch.setattr(ray, "is_initialized", lambda: next(answers, True))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_executor, "_connect", lambda *_: connections.append(1))
    results = ray_executor._Pool.results

    def results_until_one_is_lost(pool):
        for result in results(pool):
            yield result
            if len(connections) == 1:
                raise ray_executor._UnheardError("Ray does not report its workers to this process")

    monkeypatch.setattr(ray_executor._Pool, "results", results_until_one_is_lost)
    summary = label_images(images, tmp_path / "ray", on_ray(config))
    assert (len(connections), summary.rows) == (2, 12)
    assert equal(tmp_path / "ray", tmp_path / "alone")


def test_labels_do_not_depend_on_the_number_of_workers(images, tmp_path, config, local_ray):
    for workers in (1, 3):
        label_images(images, tmp_path / str(workers), on_ray(config, workers=workers, shard_size=1))
    assert equal(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize(("share", "workers"), [(1.0, 2), (0.5, 2)])
def test_each_worker_sees_its_own_gpu_as_the_first(images, tmp_path, config, local_ray, monkeypatch, share, workers):
    """On two GPUs that only Ray's books have: what a worker would compute on, before it labels on the CPU after all."""
    import ray

    label_images(images, tmp_path / "alone", config)
    seen = tmp_path / "seen"
    seen.mkdir()

    class Seeing(ray_executor._Worker):  # in here, so that Ray sends its code
        def prepare(self) -> None:
            told = [self.job.device, os.environ["CUDA_VISIBLE_DEVICES"], ray.get_gpu_ids()]
            (seen / str(os.getpid())).write_text(json.dumps(told))
            self.job = dataclasses.replace(self.job, device="cpu")
            super().prepare()

    monkeypatch.setattr(ray_executor, "_Worker", Seeing)
    run = ray_executor.run_on_ray

    def run_on_gpus(tasks, job, advance):
        return run(tasks, dataclasses.replace(job, device="cuda:0"), advance)  # as pick_device has it

    monkeypatch.setattr("labeler.run.run_on_ray", run_on_gpus)
    label_images(images, tmp_path / "ray", on_ray(config, workers=workers, gpus_per_worker=share, shard_size=1))
    told = [json.loads(path.read_text()) for path in seen.iterdir()]
    assert {device for device, _, _ in told} == {"cuda"}
    assert all(len(visible.split(",")) == 1 and ids == [int(visible)] for _, visible, ids in told)
    assert len({visible for _, visible, _ in told}) == (2 if share == 1 else 1)  # two halves of one GPU
    assert LabelStore(tmp_path / "ray").keys == LabelStore(tmp_path / "alone").keys


def test_a_certain_gpu_for_workers_is_refused_before_anything(config):
    with pytest.raises(InputError, match=r"got device cuda:1, 2 workers, expected cuda. CUDA_VISIBLE_DEVICES"):
        on_ray(config, device="cuda:1")
    assert dataclasses.replace(config, device="cuda:1").device == "cuda:1"  # in this process it may be chosen


def test_real_photographs_through_a_timm_teacher_and_two_workers(photographs, tmp_path, config, local_ray):
    teacher = TeacherConfig("resnet10t", random_weights=True, input_size=96)
    settings = on_ray(config, teacher=teacher, decoder="auto", shard_size=None, batch_size=16)
    summary = label_images(photographs, tmp_path / "labels", settings)
    assert (summary.rows, summary.quarantined) == (150, 0)
    found = verify_store(tmp_path / "labels", photographs, relabel=10, device="cpu")
    assert found.problems == ()
    labels = LabelStore(tmp_path / "labels")
    assert labels.meta.num_classes == 1000
    # The folders are ImageNet's own ids: every image has its true class.
    assert (labels.column("target") >= 0).all()
    assert labels.meta.class_names[labels.column("target")[0]] == "tiger shark"
