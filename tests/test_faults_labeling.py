"""Workers, drivers and nodes that die while they label, and clusters that are not there."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from faults import FULL, counts, tally
from labeling_runs import (
    TESTS,
    Watched,
    arguments,
    assert_undisturbed,
    command,
    descendants,
    equal,
    held_teacher,
    held_worker,
    in_child,
    red_image,
    start,
    state,
    wait_for_markers,
    wait_until,
    workers_below,
)
from tiny import make_images

from labeler import LabelerConfig, LabelingError, LabelStore, TeacherConfig, label_images
from labeler.checks.verify import verify_store


def on_ray(config: LabelerConfig, **changes: object) -> LabelerConfig:
    return dataclasses.replace(config, **{"workers": 2, "threads": 1, **changes})


@pytest.fixture
def held(tmp_path: Path, config: LabelerConfig, monkeypatch: pytest.MonkeyPatch) -> LabelerConfig:
    """Seven shards, one with a red image over which the teacher waits for `tmp_path`/held/open; one run undisturbed."""
    teacher = TeacherConfig(held_teacher(tmp_path / "held"))
    monkeypatch.syspath_prepend(tmp_path / "held")
    red_image(make_images(tmp_path / "images", 25) / "class1" / "red.jpg")
    config = dataclasses.replace(config, teacher=teacher, batch_size=2, max_attempts=10)
    (tmp_path / "held" / "open").touch()
    label_images(tmp_path / "images", tmp_path / "undisturbed", config)
    return config


def close_gate(folder: Path) -> None:
    for path in [folder / "open", *folder.glob("*.held")]:
        path.unlink(missing_ok=True)


@pytest.mark.fault(1)
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers through /proc")
def test_killed_workers_lose_and_double_nothing(tmp_path, held, local_ray):
    """In each run one dies at a random moment, idle, loading or labeling, and one in the middle of a shard."""
    gate, random = tmp_path / "held", np.random.default_rng(1)
    for run in range(counts(1, 10)):
        close_gate(gate)
        store, wanted = tmp_path / f"run {run}", int(random.integers(0, 4))

        def kill_two(store: Path = store, wanted: int = wanted) -> dict[str, tuple[int, int]]:
            wait_for_markers(store, wanted, lambda: True)
            wait_until(lambda: workers_below(os.getpid()))
            first = int(random.choice(workers_below(os.getpid())))
            os.kill(first, signal.SIGKILL)
            second = held_worker(gate, {first})
            os.kill(second, signal.SIGKILL)
            held_worker(gate, {first, second})
            committed = state(store)
            (gate / "open").touch()
            return committed

        with ThreadPoolExecutor(1) as killer:
            killing = killer.submit(kill_two)
            summary = label_images(tmp_path / "images", store, on_ray(held))
            committed = killing.result()
        assert summary.rows == 26
        assert {n: v for n, v in committed.items() if n.endswith(".json")}.items() <= state(store).items()
        assert_undisturbed(1, store, tmp_path / "undisturbed", kills=2)


@pytest.mark.fault(2)
def test_a_shard_over_which_workers_die_is_named_and_the_rest_is_labeled(images, tmp_path, config, local_ray, caplog):
    red_image(images / "class1" / "red.jpg")
    crashing = on_ray(config, teacher=TeacherConfig("tiny:crashing_teacher"), max_attempts=2)
    with pytest.raises(LabelingError, match=r"1 shard.*shard 2 .*class1/red\.jpg.*2 failures"):
        label_images(images, tmp_path / "labels", crashing)
    attempts = [r.getMessage() for r in caplog.records if r.getMessage().startswith("shard 2 failed, attempt")]
    assert len(attempts) == 2
    markers = sorted(path.name for path in (tmp_path / "labels").glob("shard-*.json"))
    assert markers == [f"shard-{i:05d}-of-00004.json" for i in (0, 1, 3)]
    tally(2, injected=len(attempts))


@pytest.mark.fault(3)
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_leaves_a_store_that_the_next_run_completes(tmp_path, config):
    """SIGKILL at random moments; no committed shard is labeled again."""
    images = make_images(tmp_path / "images", 40)
    slow = dataclasses.replace(config, teacher=TeacherConfig("tiny:slow_teacher"), batch_size=2)
    label_images(images, tmp_path / "undisturbed", slow)
    random = np.random.default_rng(0)
    for run in range(counts(1, 7)):
        store = tmp_path / f"run {run}"
        child = in_child(lambda store=store: label_images(images, store, slow))
        wait_for_markers(store, int(random.integers(0, 10)), child.is_alive)
        child.join(float(random.uniform(0, 0.2)))
        child.kill()
        child.join()
        committed = {n: v for n, v in state(store).items() if n.endswith(".json")}
        label_images(images, store, slow)
        assert committed.items() <= state(store).items(), "a committed shard was labeled again"
        assert_undisturbed(3, store, tmp_path / "undisturbed", kills=1)


@pytest.mark.fault(3)
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_on_a_cluster_leaves_a_store_that_the_next_run_completes(tmp_path, held, local_ray):
    """Its actors may work on for a while, beside those of the next run."""
    import ray

    gate, address = tmp_path / "held", ray.get_runtime_context().gcs_address
    path = f"{TESTS}:{gate}"
    for run in range(counts(1, 3)):
        close_gate(gate)
        store = tmp_path / f"run {run}"
        driver = subprocess.Popen(
            command(tmp_path / "images", store, "--workers", "2", "--ray-address", address, teacher=held.teacher.name),
            env={**os.environ, "PYTHONPATH": path},
            cwd=TESTS.parent,
        )
        wait_until(lambda driver=driver: list(gate.glob("*.held")) or driver.poll() is not None)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        committed = {n: v for n, v in state(store).items() if n.endswith(".json")}
        (gate / "open").touch()
        label_images(tmp_path / "images", store, held)
        assert committed.items() <= state(store).items(), "a committed shard was labeled again"
        wait_until(lambda: not workers_below(os.getpid()))
        # An actor that outlived its driver may have left a file behind after the run had swept the folder.
        label_images(tmp_path / "images", store, held)
        assert_undisturbed(3, store, tmp_path / "undisturbed", kills=1)


@pytest.mark.fault(4)
def test_two_drivers_at_once_make_the_store_of_one(images, tmp_path, config):
    slow = dataclasses.replace(config, teacher=TeacherConfig("tiny:slow_teacher"), batch_size=2)
    both = [in_child(lambda: label_images(images, tmp_path / "labels", slow)) for _ in range(2)]
    for child in both:
        child.join(120)
    assert [child.exitcode for child in both] == [0, 0]
    label_images(images, tmp_path / "alone", slow)
    assert_undisturbed(4, tmp_path / "labels", tmp_path / "alone", injected=1)


@pytest.mark.fault(4)
def test_of_two_drivers_that_publish_at_the_same_moment_the_first_marker_wins(images, tmp_path, config):
    """Both come to every exclusive link together, one of them with files that are packed otherwise."""
    store, meeting = tmp_path / "labels", multiprocessing.get_context("fork").Barrier(2)

    def drive(level: int) -> None:
        import labeler.store.hdf5.build_shard

        labeler.store.hdf5.build_shard.LEVEL = level
        with Watched(lambda _, name, __: name == "link" and meeting.wait(60)) as calls:
            label_images(images, store, config)
        assert sum(name == "link" for name, _ in calls.log) == 4, "the plan and three markers"

    both = [in_child(lambda level=level: drive(level)) for level in (6, 1)]
    for child in both:
        child.join(120)
    assert [child.exitcode for child in both] == [0, 0]
    label_images(images, tmp_path / "alone", config)
    assert equal(store, tmp_path / "alone")
    assert verify_store(store, images).problems == ()
    assert len(list(store.iterdir())) == len(list((tmp_path / "alone").iterdir()))
    keys = LabelStore(store).keys
    tally(4, injected=3, lost=12 - len(set(keys)), doubled=len(keys) - len(set(keys)))


def lose_a_node(images: Path, store: Path, gate: Path, config: LabelerConfig) -> None:
    """Label on a cluster of three nodes; the one whose worker is in the middle of a shard goes. For a process alone."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The head has no room for workers: the cluster would go with it.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def lose() -> int:
        worker = held_worker(gate, set())
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        (lost,) = [i for i, raylet in enumerate(raylets) if worker in descendants(raylet)]
        cluster.remove_node(nodes[lost], allow_graceful=False)
        held_worker(gate, {worker})
        (gate / "open").touch()
        return worker

    with ThreadPoolExecutor(1) as thread:
        losing = thread.submit(lose)
        summary = label_images(images, store, config)
        losing.result()
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
    print(json.dumps({"rows": summary.rows, "nodes": len(ray.nodes())}))
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.fault(5)
@pytest.mark.timeout(600)
@pytest.mark.skipif(not FULL, reason="make faults: a cluster of three nodes takes half a minute")
def test_the_shards_of_a_lost_node_are_labeled_on_another(tmp_path, held):
    gate, store = tmp_path / "held", tmp_path / "labels"
    close_gate(gate)
    code = (
        "from pathlib import Path; import test_faults_labeling as t\n"
        "from labeler import LabelerConfig, TeacherConfig\n"
        f"config = LabelerConfig(TeacherConfig({held.teacher.name!r}), levels={held.levels},"
        f" threshold={held.threshold}, shard_size=4, batch_size=2, decoder='pil', threads=1,"
        " progress=False, workers=2)\n"
        f"t.lose_a_node(Path({str(tmp_path / 'images')!r}), Path({str(store)!r}), Path({str(gate)!r}), config)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{gate}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(told) == {"rows": 26, "nodes": 3}
    assert_undisturbed(5, store, tmp_path / "undisturbed", kills=1)


@pytest.mark.fault(6)
def test_a_shard_for_which_memory_is_refused_is_named(images, tmp_path, config):
    red_image(images / "class1" / "red.jpg")
    failing = dataclasses.replace(config, teacher=TeacherConfig("labeling_runs:out_of_memory"))
    with pytest.raises(LabelingError, match=r"shard 2 .*class1/red\.jpg.*MemoryError: Unable to allocate"):
        label_images(images, tmp_path / "labels", failing)
    assert len(list((tmp_path / "labels").glob("shard-*.json"))) == 2
    tally(6, injected=1)


@pytest.mark.fault(6)
@pytest.mark.skipif(not FULL, reason="make faults: to Ray it is what a crash is")
def test_a_shard_whose_workers_the_kernel_kills_is_given_up_after_the_attempts(images, tmp_path, config, local_ray):
    red_image(images / "class1" / "red.jpg")
    killed = on_ray(config, teacher=TeacherConfig("labeling_runs:killed_for_its_memory"), max_attempts=2)
    with pytest.raises(LabelingError, match=r"1 shard.*shard 2 .*2 failures.*needs too much memory"):
        label_images(images, tmp_path / "labels", killed)
    assert len(list((tmp_path / "labels").glob("shard-*.json"))) == 3
    tally(6, kills=2)


@pytest.mark.fault(6)
@pytest.mark.timeout(600)
@pytest.mark.skipif(not FULL, reason="make faults: a Ray of its own takes a quarter of a minute")
def test_workers_that_ray_kills_for_the_nodes_memory_end_the_run_in_one_line(images, tmp_path):
    """Its threshold is lowered below what is in use anyway."""
    limits = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "50"}
    done = subprocess.run(
        command(images, tmp_path / "labels", "--workers", "1", "--max-attempts", "1"),
        env={**os.environ, **limits, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(errors) == 1
    assert "low on memory" in errors[0]
    tally(6, kills=1)


UNREACHABLE = """
import sys, ray
from labeler.__main__ import main
print(main(sys.argv[2:] + ["--ray-address", "127.0.0.1:1"]), flush=True)
print(main(sys.argv[2:] + ["--ray-address", sys.argv[1].split()[0]]), flush=True)
ray.__version__ = "0.0.1"
print(main(sys.argv[2:] + ["--ray-address", sys.argv[1].split()[1]]), flush=True)
"""


@pytest.mark.fault(37)
def test_a_cluster_that_cannot_be_joined_is_told_in_one_line(images, tmp_path, local_ray):
    """A closed port, a port of something else, and a cluster of another version of Ray."""
    import ray

    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=answer_as_a_web_server, args=(other,), daemon=True).start()
        addresses = [f"127.0.0.1:{other.getsockname()[1]}", ray.get_runtime_context().gcs_address]
        given = arguments(images, tmp_path / "labels", "--workers", "1")
        process = start([sys.executable, "-c", UNREACHABLE, " ".join(addresses), *given])
        out, error = process.communicate(timeout=120)
    assert out.split() == ["2", "2", "2"], error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error
    assert "127.0.0.1:1" in lines[0]
    assert "Connection refused" in lines[0]
    assert addresses[0] in lines[1]
    assert "not Ray's" in lines[1]
    assert "0.0.1" in lines[2]
    assert ray.__version__ in lines[2]
    assert not list((tmp_path / "labels").glob("shard-*"))
    tally(37, injected=3)


def answer_as_a_web_server(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(1024)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
