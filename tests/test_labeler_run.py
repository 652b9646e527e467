"""Labeling runs: they resume, refuse to mix, survive a failing disk and two at once, and can be stopped."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from tiny import CLASSES, encoded, make_images, picture

import labeler.commit
from labeler import IntegrityError, LabelerConfig, LabelingError, LabelStore, MismatchError, TeacherConfig, label_images
from labeler.commit import publish_exclusively
from labeler.verify import verify_store

TESTS = Path(__file__).parent


def content(store: Path) -> list[tuple[np.ndarray, ...]]:
    """Everything that a store holds, decoded, shard by shard."""
    labels = LabelStore(store)
    shards = [labels.read_shard(i) for i in range(labels.meta.shards)]
    return [
        (s.scores, s.background, s.classes, s.region, s.image_size, s.target, s.image_digest, s.keys) for s in shards
    ]


def equal(a: Path, b: Path) -> bool:
    pairs = zip(content(a), content(b), strict=True)
    return all(np.array_equal(x, y) for left, right in pairs for x, y in zip(left, right, strict=True))


def state(store: Path) -> dict[str, tuple[int, int]]:
    """Identity of every shard's file and marker: replaced or rewritten ones would differ."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in store.glob("shard-*")}


def command(images: Path, store: Path, *more: str, teacher: str = "tiny:colour_teacher") -> list[str]:
    options = ["--teacher", teacher, "--shard-size", "4", "--batch-size", "2", "--decoder", "pil", "--threads", "1"]
    return [sys.executable, "-m", "labeler", "label", str(images), "--store", str(store), "--quiet", *options, *more]


def start(arguments: list[str], **options: object) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        arguments, env=env, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_second_run_labels_nothing_and_changes_nothing(images, store, config):
    before = state(store)
    summary = label_images(images, store, config)
    assert summary.labeled_now == 0
    assert summary.rows == 12
    assert state(store) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "marker", "view"])
def test_only_what_is_damaged_is_labeled_again(images, store, tmp_path, config, damage):
    before, good = state(store), sorted(store.glob("shard-*.h5"))
    reference = content(store)
    if damage == "view":
        (store / "labels.h5").unlink()
    elif damage == "marker":
        marker = store / good[1].name.replace(good[1].suffixes[-2] + ".h5", ".json")
        marker.write_text(marker.read_text()[:-30])
    elif damage == "remove":
        good[1].unlink()
    else:
        data = bytearray(good[1].read_bytes())
        data[len(data) // 3] ^= 1
        good[1].write_bytes(data[: len(data) - 10 * (damage == "cut")])
    summary = label_images(images, store, config)
    assert summary.labeled_now == (0 if damage == "view" else 4)
    kept = {name: value for name, value in before.items() if "00001-of" not in name}
    assert kept.items() <= state(store).items()
    assert verify_store(store, images).problems == ()
    for left, right in zip(reference, content(store), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"palette": 4}, "palette"),
        ({"precision": "float16"}, "precision"),
        ({"fine_step": 0.1}, "fine_step"),
        ({"orientation": "ignore"}, "orientation"),
        ({"shard_size": 5}, "shard_size"),
        ({"min_side": 9}, "min_side"),
        ({"teacher": TeacherConfig("tiny:colour_teacher", view="center")}, "view"),
        ({"teacher": TeacherConfig("tiny:colour_teacher", flip=True)}, "flip"),
        ({"teacher": TeacherConfig("tiny:slow_teacher")}, "name"),
        ({"teacher": TeacherConfig("tiny:colour_teacher", mean=(0.4, 0.5, 0.5))}, "mean"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_are_refused_by_name(images, store, config, change, word):
    before = state(store)
    with pytest.raises(MismatchError, match=word):
        label_images(images, store, dataclasses.replace(config, **change))
    assert state(store) == before


def test_other_images_are_refused_and_named(images, store, config):
    (images / "class0" / "added.jpg").write_bytes(encoded(picture(99)))
    with pytest.raises(MismatchError, match=r"1 new \('class0/added\.jpg'\)"):
        label_images(images, store, config)


def test_a_folder_with_other_things_in_it_is_not_written_to(images, tmp_path, config):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    with pytest.raises(Exception, match=r"not empty.*thesis\.tex"):
        label_images(images, tmp_path / "used", config)
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thesis.tex"]


def test_workers_of_two_runs_may_overlap(images, tmp_path, config):
    """Both write every shard; the first marker wins, and the loser's file is swept."""
    alone = tmp_path / "alone"
    label_images(images, alone, config)
    slow = dataclasses.replace(config, teacher=TeacherConfig("tiny:slow_teacher"), batch_size=2)
    both = [in_child(lambda: label_images(images, tmp_path / "labels", slow)) for _ in range(2)]
    for child in both:
        child.join(120)
    assert [child.exitcode for child in both] == [0, 0]
    label_images(images, tmp_path / "slow alone", slow)
    assert equal(tmp_path / "labels", tmp_path / "slow alone")
    assert len(list((tmp_path / "labels").glob("shard-*.h5"))) == 3
    assert not list((tmp_path / "labels").glob(".tmp-*"))


def test_the_first_marker_wins(tmp_path):
    assert publish_exclusively(tmp_path / "marker", b"first")
    assert not publish_exclusively(tmp_path / "marker", b"second")
    assert (tmp_path / "marker").read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1


CALLS = ["open", "write", "fsync", "rename", "link"]
BEFORE_SHARD_1 = {
    "write": 3,
    "fsync": 6,
}  # these calls carry no file name: the plan's and the first shard's come before


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_loses_no_shard_and_leaves_no_litter(images, tmp_path, config, monkeypatch, call, code):
    """The call fails for the second shard's file or marker; the next run ends with the undisturbed store."""
    store, real, seen = tmp_path / "labels", getattr(os, call), []

    def failing(*arguments, **options):
        seen.append(arguments)
        if any("shard-00001-of" in str(a) for a in arguments) or (len(seen) > BEFORE_SHARD_1.get(call, 99)):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"labeler.commit.os.{call}", failing)
        with pytest.raises(LabelingError, match="committed shard is kept"):
            label_images(images, store, config)
    assert (store / "shard-00000-of-00003.json").exists()
    assert not (store / "shard-00001-of-00003.json").exists()
    assert not list(store.glob(".tmp-*"))
    with pytest.raises(IntegrityError, match="not complete"):
        LabelStore(store)
    label_images(images, store, config)
    label_images(images, tmp_path / "undisturbed", config)
    assert equal(store, tmp_path / "undisturbed")


@pytest.mark.parametrize("call", CALLS)
def test_killed_at_any_system_call_of_a_commit(images, tmp_path, config, call):
    """SIGKILL just before and just after a call: a shard is absent or whole, and the next run completes the store."""
    label_images(images, tmp_path / "undisturbed", config)
    for nth in range(2, 5):
        for after in (False, True):
            store = tmp_path / f"{nth} {after}"

            def killed_run(store: Path = store, nth: int = nth, after: bool = after) -> None:
                real, count = getattr(os, call), 0

                def dying(*arguments, **options):
                    nonlocal count
                    count += 1
                    if count == nth and not after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = real(*arguments, **options)
                    if count == nth:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result

                setattr(labeler.commit.os, call, dying)
                label_images(images, store, config)

            child = in_child(killed_run)
            child.join(60)
            assert child.exitcode == -signal.SIGKILL
            committed = {n: v for n, v in state(store).items() if n.endswith(".json")}
            for marker in committed:
                assert (store / json.loads((store / marker).read_bytes())["file"]).exists()
            label_images(images, store, config)
            assert committed.items() <= state(store).items()
            assert equal(store, tmp_path / "undisturbed")
            assert not list(store.glob(".tmp-*"))


def test_a_file_size_limit_is_an_error_and_not_a_loss(images, tmp_path, config):
    store = tmp_path / "labels"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    process = start(command(images, store, "--shard-size", "12"), preexec_fn=limit)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "File too large" in error
    assert "Traceback" not in error
    assert not list(store.glob(".tmp-*"))
    label_images(images, store, dataclasses.replace(config, shard_size=12, batch_size=2))
    assert verify_store(store, images).problems == ()


def test_a_full_disk_is_an_error_and_not_a_loss(images, tmp_path, config):
    """A real small file system, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    label = " ".join(command(images, disk / "labels", "--shard-size", "2"))
    script = (
        f"mount -t tmpfs -o size=48k tmpfs {disk} && {label}; echo status $?; "
        f"ls -A {disk}/labels; cp -r {disk}/labels {tmp_path}/kept"
    )
    process = in_namespace(script)
    assert "status 1" in process.stdout
    assert "No space left" in process.stderr
    assert "Traceback" not in process.stderr
    assert ".tmp-" not in process.stdout
    kept = state(tmp_path / "kept")
    assert len(kept) >= 2
    label_images(images, tmp_path / "kept", dataclasses.replace(config, shard_size=2, batch_size=2))
    assert set(kept) <= set(state(tmp_path / "kept"))
    assert verify_store(tmp_path / "kept", images).problems == ()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_143_and_what_is_committed(images, tmp_path, config, number):
    store = tmp_path / "labels"
    process = start(command(images, store, teacher="tiny:slow_teacher"))
    wait_for_markers(store, 1, lambda: process.poll() is None)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    # The run may have been over before the signal came; then it was whole.
    assert process.returncode in (143, 0)
    assert "Traceback" not in error
    assert not list(store.glob(".tmp-*"))
    slow = dataclasses.replace(config, teacher=TeacherConfig("tiny:slow_teacher"), batch_size=2)
    label_images(images, store, slow)
    assert verify_store(store, images).problems == ()


def in_child(work: Callable[[], object]) -> BaseProcess:
    """`work` in a real process that can be killed, without the seconds that importing torch takes."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def wait_for_markers(store: Path, count: int, alive: Callable[[], bool]) -> None:
    """Until so many shards are committed, or the process has ended."""
    while alive() and len(list(store.glob("shard-*.json"))) < count:
        os.sched_yield()


def test_ten_random_kills_of_a_run_in_one_process(tmp_path, config):
    images = make_images(tmp_path / "images", 40)
    slow = dataclasses.replace(config, teacher=TeacherConfig("tiny:slow_teacher"), batch_size=2)
    label_images(images, tmp_path / "undisturbed", slow)
    random = np.random.default_rng(0)
    for run in range(10):
        store = tmp_path / f"run {run}"
        child = in_child(lambda store=store: label_images(images, store, slow))
        wait_for_markers(store, int(random.integers(0, 10)), child.is_alive)
        child.join(float(random.uniform(0, 0.2)))
        child.kill()
        child.join()
        committed = {n: v for n, v in state(store).items() if n.endswith(".json")}
        label_images(images, store, slow)
        assert committed.items() <= state(store).items(), "a committed shard was labeled again"
        assert equal(store, tmp_path / "undisturbed")
        assert len(list(store.iterdir())) == len(list((tmp_path / "undisturbed").iterdir()))


def run_cli(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "labeler", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_tells_its_status(images, tmp_path):
    store = tmp_path / "labels"
    done = start([*command(images, store), "--json"])
    out, _ = done.communicate(timeout=120)
    assert done.returncode == 0
    assert json.loads(out)["rows"] == 12
    checked = run_cli("verify", store, "--images", images, "--json", "--quiet")
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["problems"] == []
    (store / "labels.h5").unlink()
    assert run_cli("verify", store).returncode == 4
    for wrong in (
        ["label", images, "--store", store],
        ["label", tmp_path / "absent", "--store", store, "--teacher", "resnet18"],
        ["verify", tmp_path],
        ["label", images, "--store", tmp_path / "new", "--teacher", "resnet18", "--palette", "0"],
    ):
        result = run_cli(*wrong)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1
    (images / "class0" / "bad.jpg").write_bytes(b"text")
    process = start(command(images, tmp_path / "other"))
    assert process.wait(120) == 3


def test_a_read_only_disk_is_told_before_any_work(images, tmp_path):
    """A real one, in a mount namespace: root may write wherever modes alone forbid it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    process = in_namespace(
        f"mount -t tmpfs -o ro tmpfs {disk} && {' '.join(command(images, disk / 'labels'))}; echo status $?"
    )
    assert "status 2" in process.stdout
    assert "cannot be written: got Read-only file system" in process.stderr
    assert "Traceback" not in process.stderr


def in_namespace(script: str) -> subprocess.CompletedProcess:
    """Run a shell script that may mount; the test is skipped where the system does not allow that."""
    process = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare:" in process.stderr or "mount:" in process.stderr:
        pytest.skip(f"no private mount here: {process.stderr.strip().splitlines()[0]}")
    return process


def test_a_store_that_cannot_be_a_folder_is_told_before_any_work(images, tmp_path, config):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "labels"):
        with pytest.raises(Exception, match="cannot be written"):
            label_images(images, path, config)


def test_a_read_only_store_can_be_read(store):
    for path in [*store.iterdir(), store]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert len(LabelStore(store).read(range(12))) == 12
    assert verify_store(store).problems == ()
    store.chmod(0o755)


def test_locale_and_time_zone_do_not_change_the_store(images, tmp_path):
    odd = {**os.environ, "PYTHONPATH": str(TESTS), "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONUTF8": "0"}
    (images / "class0" / "größe 写真.jpg").write_bytes(encoded(picture(5)))
    for name, env in (("a", odd), ("b", {**os.environ, "PYTHONPATH": str(TESTS)})):
        subprocess.run(command(images, tmp_path / name), env=env, cwd=TESTS.parent, check=True, capture_output=True)
    assert equal(tmp_path / "a", tmp_path / "b")


def test_the_default_shard_size_gives_every_worker_some():
    from labeler.run import default_shard_size

    assert [default_shard_size(n) for n in (1, 150, 20_000, 1_281_167)] == [32, 32, 313, 10_000]
    assert LabelerConfig(TeacherConfig("x")).shard_size is None
    assert CLASSES == 6
