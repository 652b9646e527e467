"""Labeling on a real local Ray: the same labels as in one process, whatever is killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_labeler_run import command, equal, start, state, wait_for_markers
from tiny import make_images

from labeler import InputError, LabelerConfig, LabelingError, LabelStore, TeacherConfig, TeacherError, label_images
from labeler.verify import verify_store

TESTS = Path(__file__).parent
# Ten is what is claimed; the ordinary suite runs a few of them. LABELER_KILLS=10 runs all.
KILLS = int(os.environ.get("LABELER_KILLS", "3"))


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


def test_a_shard_over_which_workers_die_is_named_and_the_rest_is_labeled(images, tmp_path, config, local_ray):
    red = images / "class1" / "red.jpg"
    Image.new("RGB", (48, 40), (255, 0, 0)).save(red, quality=95)
    crashing = on_ray(config, teacher=TeacherConfig("tiny:crashing_teacher"), max_attempts=2)
    with pytest.raises(LabelingError, match=r"1 shard.*shard 2 .*2 failures"):
        label_images(images, tmp_path / "labels", crashing)
    markers = sorted(path.name for path in (tmp_path / "labels").glob("shard-*.json"))
    assert markers == [f"shard-{i:05d}-of-00004.json" for i in (0, 1, 3)]


def test_an_address_where_no_cluster_answers_is_one_line(images, tmp_path):
    done = subprocess.run(
        command(images, tmp_path / "labels", "--workers", "1", "--ray-address", "127.0.0.1:1"),
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == InputError.exit_status
    assert "127.0.0.1:1" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent, command line) of everything that runs."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                found[int(folder.name)] = parent, (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
    return found


def descendants(pid: int) -> dict[int, str]:
    everything, below, grown = processes(), {pid}, True
    while grown:
        more = {p for p, (parent, _) in everything.items() if parent in below} - below
        below, grown = below | more, bool(more)
    return {p: everything[p][1] for p in below if p in everything}


def kill_tree(pids: dict[int, str]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers through /proc")
@pytest.mark.timeout(900)
def test_random_kills_of_actor_driver_and_both(tmp_path, config):
    """Started again, the store is that of an undisturbed run, and no committed shard was touched."""
    images = make_images(tmp_path / "images", 48)
    slow = dataclasses.replace(config, teacher=TeacherConfig("tiny:slow_teacher"), batch_size=2)
    label_images(images, tmp_path / "undisturbed", slow)
    random = np.random.default_rng(1)
    killed = []
    for run in range(KILLS):
        store, victim = tmp_path / f"run {run}", ("actor", "driver", "both")[run % 3]
        driver = start(command(images, store, "--workers", "2", teacher="tiny:slow_teacher"))
        wanted = int(random.integers(0, 11))
        while driver.poll() is None and len(list(store.glob("shard-*.json"))) < wanted:
            time.sleep(0.001)
        tree = descendants(driver.pid)
        actors = [pid for pid, command in tree.items() if command.startswith("ray::_Worker")]
        if victim in ("driver", "both"):
            driver.kill()
        if victim in ("actor", "both") and actors:
            os.kill(actors[int(random.integers(len(actors)))], signal.SIGKILL)
            killed.append(victim)
        _, error = driver.communicate(timeout=240)
        if victim == "actor":
            assert driver.returncode == 0, error
        kill_tree(tree)
        committed = {name: value for name, value in state(store).items() if name.endswith(".json")}
        label_images(images, store, slow)
        assert committed.items() <= state(store).items(), "a committed shard was labeled again"
        assert equal(store, tmp_path / "undisturbed")
        assert LabelStore(store).keys == sorted(set(LabelStore(store).keys))
        assert not list(store.glob(".tmp-*"))
    assert killed, "no actor was ever found"


def test_a_signal_ends_a_run_on_ray_with_143(images, tmp_path):
    store = tmp_path / "labels"
    process = start(command(images, store, "--workers", "2", "--shard-size", "1", teacher="tiny:slow_teacher"))
    wait_for_markers(store, 1, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    # The run may have been over before the signal came.
    assert process.returncode in (143, 0), error
    assert "Traceback" not in error


def test_labels_do_not_depend_on_the_number_of_workers(images, tmp_path, config, local_ray):
    for workers in (1, 3):
        label_images(images, tmp_path / str(workers), on_ray(config, workers=workers, shard_size=1))
    assert equal(tmp_path / "1", tmp_path / "3")


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
