"""Hostile lists, odd names and clocks, disks that only read, and low limits: the same store, or one clear line."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faults import tally
from labeling_runs import TESTS, arguments, assert_undisturbed, command, equal, in_own_process, state
from test_faults_commit import with_mount
from tiny import encoded, make_images, picture

from labeler import InputError, LabelingError, LabelStore, label_images
from labeler.__main__ import main
from labeler.checks.verify import verify_store

READ_ONLY, BIND, REMOUNT = 1, 1 << 12, 1 << 5  # flags of mount(2)
ODD = os.fsdecode(b"two words\nand caf\xe9")


@pytest.fixture
def signals() -> Iterator[None]:
    """The command line takes signals; this gives them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


HOSTILE_LINES = {
    "parent": "../x.jpg",
    "parent in the middle": "class0/../class0/img000.jpg",
    "absolute": "/etc/hostname",
    "backslashes": "..\\x.jpg",
    "doubled slash": "class0//img000.jpg",
    "dot": "./class0/img000.jpg",
    "NUL": "a\0b.jpg",
    "link out": "out.jpg",
    "below a link out": "etc/hostname",
    "absent": "absent.jpg",
    "folder": "class0",
    "duplicate": "class1/img001.jpg",
    "case collision": "CLASS1/img001.jpg",
    "too long": "x" * 300 + ".jpg",
}


@pytest.mark.fault(20)
@pytest.mark.parametrize("line", HOSTILE_LINES.values(), ids=HOSTILE_LINES.keys())
def test_a_list_that_leaves_the_root_or_repeats_is_refused_with_its_line(images, tmp_path, capsys, signals, line):
    (images / "out.jpg").symlink_to("/etc/hostname")
    (images / "etc").symlink_to("/etc")
    (tmp_path / "list").write_bytes(f"class1/img001.jpg\n\n{line}\nclass2/img002.jpg\n".encode())
    status = main(arguments(images, tmp_path / "labels", "--image-list", str(tmp_path / "list")))
    error = capsys.readouterr().err
    tally(20, injected=1)
    assert status == 2
    assert "list, line 3: got" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "labels").exists()


@pytest.mark.fault(20)
def test_a_list_may_name_what_a_name_can_hold(tmp_path, config):
    """Lines end where a line feed is, with or without a carriage return, and at no other character."""
    images, names = make_images(tmp_path / "images", 3), ["a\x85b.jpg", "c\u2028d.jpg", "e f.jpg"]
    for i, name in enumerate(names):
        (images / name).write_bytes(encoded(picture(i)))
    (tmp_path / "list").write_text("\r\n".join([*names, ""]), newline="")
    label_images(images, tmp_path / "labels", dataclasses.replace(config, image_list=str(tmp_path / "list")))
    assert LabelStore(tmp_path / "labels").keys == sorted(names)
    tally(20, injected=3)


@pytest.mark.fault(38)
def test_a_clock_that_jumps_and_files_from_the_future_make_the_same_store(images, tmp_path, config, monkeypatch):
    label_images(images, tmp_path / "undisturbed", config)
    random, real = np.random.default_rng(38), time.time
    for n, path in enumerate(sorted(images.rglob("*.jpg"))):
        os.utime(path, (n * 4e8, n * 4e8))
    century = 3e9
    monkeypatch.setattr(time, "time", lambda: real() + random.uniform(-century, century))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
    label_images(images, tmp_path / "labels", config)
    label_images(images, tmp_path / "labels", config)
    assert_undisturbed(38, tmp_path / "labels", tmp_path / "undisturbed", injected=1)


def odd_images(root: Path) -> Path:
    make_images(root)
    for name in ("größe 写真.jpg", "new\nline.jpg", " leading and trailing .jpg", os.fsdecode(b"caf\xe9.jpg")):
        (root / "class0" / name).write_bytes(encoded(picture(5)))
    (root / "class\n 9").mkdir()
    (root / "class\n 9" / "x.jpg").write_bytes(encoded(picture(6)))
    return root


@pytest.mark.fault(38)
@pytest.mark.parametrize("locale", ["C", "UTF-8"])
def test_locale_names_and_paths_make_the_same_store(tmp_path, config, locale):
    """Line breaks, spaces and bytes that are no UTF-8, in keys and in the paths; Python's own UTF-8 mode off."""
    odd = tmp_path / ODD
    images = odd_images(odd / "images")
    (tmp_path / "plain").symlink_to(odd / "images")
    config = dataclasses.replace(config, batch_size=2)
    label_images(tmp_path / "plain", tmp_path / "undisturbed", config)
    if locale == "C":
        strange = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TZ": "Pacific/Kiritimati"}
        done = subprocess.run(
            command(images, odd / "labels"),
            env={**os.environ, **strange, "PYTHONPATH": str(TESTS)},
            cwd=TESTS.parent,
            capture_output=True,
            check=False,
        )
        status, text = done.returncode, done.stderr.decode(errors="replace")
    else:
        status, text = in_own_process(tmp_path / "errors", lambda: main(arguments(images, odd / "labels")))
    assert "Traceback" not in text, text
    assert status == 3  # the name that is no UTF-8 is in the quarantine
    (entry,) = LabelStore(odd / "labels").quarantine
    assert (entry["key"], entry["reason"]) == ("class0/caf\\xe9.jpg", "the file name is not valid UTF-8")
    assert verify_store(odd / "labels", images).problems == ()
    assert_undisturbed(38, odd / "labels", tmp_path / "undisturbed", injected=1)


def without_privileges(work: Callable[[], int]) -> int:
    """Call `work` as a process for which the modes of files count, also where it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    version, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capset(version, nothing) == 0
    return work()


@pytest.mark.fault(39)
@pytest.mark.parametrize("how", ["modes", "mount"])
def test_read_only_data_can_be_read_and_writing_says_so(images, store, tmp_path, config, how):
    """Images and store: reading, verifying and labeling elsewhere work; a whole and a partial store are not written."""
    partial = tmp_path / "partial"
    label_images(images, partial, config)
    next(partial.glob("shard-00001-of-*.json")).unlink()

    def check() -> int:
        assert len(LabelStore(store).read(range(12))) == 12
        assert verify_store(store, images).problems == ()
        label_images(images, tmp_path / "elsewhere", config)
        for labels, status in ((store, 1), (partial, 1), (images / "labels", 2)):
            print(labels.name, main(arguments(images, labels)) == status)
        return 0

    def on_read_only_mounts(mount: Callable[..., int]) -> int:
        for path in (images, store, partial):
            if mount(str(path), path, None, BIND) or mount("none", path, None, BIND | REMOUNT | READ_ONLY):
                return 99
        return check()

    folders = [images, store, partial]
    before = {path: state(path, "*") for path in folders}
    if how == "mount":
        status, text = in_own_process(tmp_path / "errors", lambda: with_mount(on_read_only_mounts))
        if status == 99:
            pytest.skip("mounting is not permitted here")
    else:
        everything = [path for folder in folders for path in (*folder.rglob("*"), folder)]
        for path in everything:
            path.chmod(0o555 if path.is_dir() else 0o444)
        status, text = in_own_process(tmp_path / "errors", lambda: without_privileges(check))
        for path in everything:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert status == 0, text
    assert "Traceback" not in text
    assert "False" not in text
    word = "Read-only file system" if how == "mount" else "Permission denied"
    assert text.count(f"failed: got {word}") == 2
    assert text.count(f"cannot be written: got {word}") == 1
    assert {path: state(path, "*") for path in folders} == before
    assert equal(tmp_path / "elsewhere", store)
    tally(39, injected=3)


@pytest.mark.fault(39)
def test_a_damaged_shard_that_cannot_be_withdrawn_is_told(images, store, tmp_path, config):
    next(store.glob("shard-00001-of-*.h5")).write_bytes(b"")
    store.chmod(0o555)
    status, text = in_own_process(
        tmp_path / "errors", lambda: without_privileges(lambda: main(arguments(images, store, "--batch-size", "3")))
    )
    store.chmod(0o755)
    assert status == 1
    assert "Traceback" not in text
    assert "writing to the store" in text
    assert "Permission denied" in text
    tally(39, injected=1)


def test_a_store_that_cannot_be_a_folder_is_told_before_any_work(images, tmp_path, config):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "labels"):
        with pytest.raises(InputError, match="cannot be written"):
            label_images(images, path, config)


@pytest.mark.fault(40)
def test_a_low_limit_on_open_files_is_enough_to_label_to_verify_and_to_read(tmp_path, config):
    images = make_images(tmp_path / "images", 24)
    config = dataclasses.replace(config, shard_size=1)
    label_images(images, tmp_path / "undisturbed", config)

    def limited() -> int:
        used = {int(number) for number in os.listdir("/proc/self/fd")}
        limit = [number for number in range(4096) if number not in used][12]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        label_images(images, tmp_path / "labels", config)
        for cache in (None, "ram-compressed"):
            assert len(LabelStore(tmp_path / "labels", cache).read(range(24))) == 24
        print(main(["verify", str(tmp_path / "labels"), "--images", str(images), "--quiet"]))
        return 0

    status, text = in_own_process(tmp_path / "errors", limited)
    assert status == 0, text
    assert "Traceback" not in text
    assert "damaged" not in text
    assert text.strip().endswith("0")
    assert_undisturbed(40, tmp_path / "labels", tmp_path / "undisturbed", injected=1)


@pytest.mark.fault(40)
def test_a_limit_on_processes_is_named(images, tmp_path, config):
    """No thread can be started. Root has no such limit, so the run becomes somebody else's."""
    label_images(images, tmp_path / "undisturbed", config)
    somebody = 64_321

    def limited() -> int:
        os.chdir(tmp_path)
        if os.getuid() == 0:
            os.chown(tmp_path, somebody, somebody)
            os.setgid(somebody)
            os.setuid(somebody)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        try:
            label_images("images", "labels", config)
        except LabelingError as error:
            print(error)
        return 0

    status, text = in_own_process(tmp_path / "errors", limited)
    assert status == 0, text
    assert "ulimit -u" in text
    label_images(images, tmp_path / "labels", config)
    assert_undisturbed(40, tmp_path / "labels", tmp_path / "undisturbed", injected=1)
