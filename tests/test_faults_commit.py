"""A commit that is cut short: killed at any system call, the power gone, the disk full or failing."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from faults import FULL, counts, tally
from labeling_runs import (
    Watched,
    arguments,
    assert_undisturbed,
    in_child,
    in_own_process,
    kill_myself,
    state,
)

from labeler import IntegrityError, LabelerConfig, LabelingError, LabelStore, label_images
from labeler.__main__ import main
from labeler.checks.verify import verify_store
from labeler.store.shard_markers import check_file, read_marker

SHARD = "shard-00001-of-00003"


def watched_run(images: Path, store: Path, config: LabelerConfig) -> list[tuple[str, tuple]]:
    with Watched() as calls:
        label_images(images, store, config)
    return calls.log


def opening(calls: list[tuple[str, tuple]], name: str) -> int:
    """The first call that opens a temporary file for `name`."""
    return next(i for i, (kind, given) in enumerate(calls) if kind == "open" and f".tmp-{name}" in str(given[0]))


def half_written(data: memoryview) -> memoryview:
    return data[: len(data) // 2]


@pytest.mark.fault(7)
@pytest.mark.parametrize("torn", [False, True], ids=["before", "half-way"])
def test_killed_at_any_system_call_of_a_run(images, tmp_path, config, torn):
    """Before each call, or in the middle of each write: a shard is absent or whole, and the next run completes it."""
    # The ordinary suite has one shard and its commit; the other files of a store are published by the same calls.
    config = config if FULL else dataclasses.replace(config, shard_size=12)
    calls = watched_run(images, tmp_path / "undisturbed", config)
    assert {name for name, _ in calls} >= {"open", "write", "fsync", "close", "rename", "link", "unlink"}
    first, last = (0, len(calls)) if FULL else (opening(calls, "shard-"), opening(calls, "quarantine") + 1)
    for number in range(first, last):
        if torn and calls[number][0] != "write":
            continue
        store = tmp_path / f"killed at {number}"

        def killed_run(number: int = number, store: Path = store) -> None:
            def strike(call: int, _: str, given: tuple) -> None:
                if call == number:
                    if torn:
                        watched.real["write"](given[0], half_written(given[1]))
                    kill_myself()

            with Watched(strike) as watched:
                label_images(images, store, config)

        child = in_child(killed_run)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        committed = state(store, "shard-*.json") if store.exists() else {}
        for marker in committed:
            read = json.loads((store / marker).read_bytes())
            assert (store / read["file"]).read_bytes() == (tmp_path / "undisturbed" / read["file"]).read_bytes()
        label_images(images, store, config)
        assert committed.items() <= state(store).items(), "a committed shard was labeled again"
        assert_undisturbed(7, store, tmp_path / "undisturbed", kills=1)


@dataclass
class Disk:
    """What a file system has on it when its power goes, from a log of the calls before.

    Names come to the disk with a sync of their folder, bytes with a sync of their file; of what was not synced, each
    name and each file's bytes may be there, not at all, or in part.
    """

    operations: list[tuple] = field(default_factory=list)
    bytes_of: list[bytearray] = field(default_factory=list)
    synced: list[int | None] = field(default_factory=list)  # operation that made the file durable

    @classmethod
    def recorded(cls, store: Path, log: list[tuple[str, tuple]]) -> Disk:
        disk = cls()
        file_of: dict[str, int] = {}
        opened: str | int = ""  # a commit has one file open at a time
        for name, given in log:
            path = Path(os.fsdecode(given[0])).name if not isinstance(given[0], int) else ""
            if name == "open" and Path(os.fsdecode(given[0])) == store:
                opened = "folder"
            elif name == "open" and given[1] & os.O_CREAT:
                opened = file_of[path] = len(disk.bytes_of)
                disk.bytes_of.append(bytearray())
                disk.synced.append(None)
                disk.operations.append(("name", path, opened))
            elif name == "write":
                disk.bytes_of[opened] += given[1]
            elif name == "fsync" and opened == "folder":
                disk.operations.append(("sync",))
            elif name == "fsync":
                disk.synced[opened] = len(disk.operations)
                disk.operations.append(("fsync", opened))
            elif name in ("rename", "link"):
                new = Path(given[1]).name
                file_of[new] = file_of[path]
                disk.operations.append(("name", new, file_of[path]))
                if name == "rename":
                    disk.operations.append(("forget", path))
            elif name == "unlink":
                disk.operations.append(("forget", path))
        return disk

    def after_power_loss(self, at: int, store: Path, random: np.random.Generator) -> None:
        """Write into `store` what may be left when the power goes right before operation `at`."""
        synced = max((i for i in range(at) if self.operations[i][0] == "sync"), default=0)
        names: dict[str, int] = {}
        for i, (kind, *rest) in enumerate(self.operations[:at]):
            if kind in ("name", "forget") and (i < synced or random.random() < 0.5):
                names.pop(rest[0], None)
                if kind == "name":
                    names[rest[0]] = rest[1]
        store.mkdir()
        for name, file in names.items():
            durable = self.synced[file] is not None and self.synced[file] < at
            (store / name).write_bytes(bytes(self.bytes_of[file]) if durable else part_of(self.bytes_of[file], random))

    def promised(self, at: int) -> set[str]:
        """Markers whose commit had returned before operation `at`."""
        synced = max((i for i in range(at) if self.operations[i][0] == "sync"), default=0)
        named = {op[1] for op in self.operations[:synced] if op[0] == "name"}
        return {name for name in named if name.startswith("shard-") and name.endswith(".json")}


def part_of(data: bytearray, random: np.random.Generator) -> bytes:
    """Nothing, zeros, a prefix, or a prefix and zeros."""
    kept = int(random.integers(0, max(1, len(data) - 1)))  # a marker's last byte is a line break, which says nothing
    return [b"", bytes(len(data)), bytes(data[:kept]), bytes(data[:kept]) + bytes(len(data) - kept)][random.integers(4)]


@pytest.mark.fault(8)
def test_what_a_power_loss_leaves_is_whole_or_absent_and_what_was_promised_is_there(images, tmp_path, config):
    log = watched_run(images, tmp_path / "undisturbed", config)
    disk = Disk.recorded(tmp_path / "undisturbed", log)
    whole = {name: (tmp_path / "undisturbed" / name).read_bytes() for name in disk.promised(len(disk.operations))}
    assert len(whole) == 3
    random = np.random.default_rng(8)
    for n, at in enumerate(np.linspace(1, len(disk.operations), counts(20, 300)).astype(int).tolist()):
        store = tmp_path / f"loss {n}"
        disk.after_power_loss(at, store, random)
        markers = {p.name: p.read_bytes() for p in store.glob("shard-*.json")}
        assert disk.promised(at) <= markers.keys()
        for name, data in markers.items():
            assert data == whole[name]
        committed = state(store, "shard-*.json")
        label_images(images, store, config)
        assert committed.items() <= state(store).items()
        assert_undisturbed(8, store, tmp_path / "undisturbed", injected=1)


def refuses(store: Path, shard: int) -> bool:
    """Whether marker and file of the shard, as any reader would compare them, are told to be damaged."""
    try:
        marker = read_marker(store, shard, 3)
        assert marker is not None
        check_file(store, marker)
    except IntegrityError as error:
        return f"shard-{shard:05d}-of" in str(error)
    return False


@pytest.mark.fault(8)
def test_a_disk_that_lies_about_its_syncs_is_found_out_by_the_digests(images, store, tmp_path, config):
    """Markers are there, and parts of their files are not: only those shards are refused, and labeled again."""
    random, good = np.random.default_rng(9), {p.name: p.read_bytes() for p in store.glob("shard-*")}
    names = sorted(good)
    for n in range(counts(10, 200)):
        lost = tmp_path / f"lost {n}"
        lost.mkdir()
        for name in ("plan.json", "labels.h5", "quarantine.jsonl"):
            (lost / name).write_bytes((store / name).read_bytes())
        # Markers and files in turn; sometimes two of them.
        damaged = {names[n % len(names)], names[int(random.integers(len(names)))]}
        for name, data in good.items():
            left = data
            while name in damaged and left == data:  # a file may end in zeros
                left = part_of(bytearray(data), random)
            (lost / name).write_bytes(left)
        shards = {int(name[6:11]) for name in damaged}
        refused = {shard for shard in range(3) if refuses(lost, shard)}
        tally(8, corruptions=len(shards), silent=len(shards - refused))
        assert refused == shards
        kept = {name: value for name, value in state(lost).items() if int(name[6:11]) not in shards}
        assert label_images(images, lost, config).labeled_now == 4 * len(shards)
        assert kept.items() <= state(lost).items()
        assert_undisturbed(8, lost, store)


def first_run_fails(
    images: Path, store: Path, config: LabelerConfig, number: int, code: int, once: bool
) -> list[tuple[str, tuple]]:
    """Run with the system call `number`, and unless `once` all of its kind after it, failing."""
    failing: list[str] = []

    def strike(call: int, name: str, given: tuple) -> None:
        if call == number:
            failing.append(name)
        if failing == [name] and (call == number or not once):
            if name == "close":  # closed it is, even if it says that something went wrong
                watched.real["close"](*given)
            watched.log.append((name, given))
            raise OSError(code, os.strerror(code))

    with Watched(strike) as watched, pytest.raises(LabelingError, match="committed shard is kept"):
        label_images(images, store, config)
    return watched.log


@pytest.mark.parametrize(
    "once", [False, True] if FULL else [False], ids=lambda once: "once" if once else "from then on"
)
@pytest.mark.parametrize(
    "code",
    [pytest.param(errno.ENOSPC, marks=pytest.mark.fault(9)), pytest.param(errno.EIO, marks=pytest.mark.fault(10))],
    ids=["ENOSPC", "EIO"],
)
def test_a_failing_disk_leaves_no_marker_no_litter_and_no_loss(images, tmp_path, config, code, once):
    """Each call of the second shard's commit fails in turn; the next run ends with the undisturbed store."""
    calls = watched_run(images, tmp_path / "undisturbed", config)
    begin, named = (
        next(i for i, (name, given) in enumerate(calls) if name == kind and SHARD in str(given[-1 if named else 0]))
        for kind, named in (("open", False), ("link", True))
    )
    for number in range(begin, named + 1):
        if calls[number][0] == "unlink":
            continue  # of a temporary file that a rename took away: there is nothing to fail
        store = tmp_path / f"{number}"
        first_run_fails(images, store, config, number, code, once)
        before = state(store)
        assert (store / "shard-00000-of-00003.json").exists()
        assert not (store / f"{SHARD}.json").exists()
        assert not list(store.glob(".tmp-*"))
        with pytest.raises(IntegrityError, match="not complete"):
            LabelStore(store, trusted=True)
        label_images(images, store, config)
        kept = {name: value for name, value in before.items() if "00000-of" in name}
        assert kept.items() <= state(store).items()
        assert_undisturbed(9 if code == errno.ENOSPC else 10, store, tmp_path / "undisturbed", injected=1)


@pytest.mark.fault(10)
def test_a_folder_that_cannot_be_synced_after_the_marker_ends_the_run(images, tmp_path, config):
    """The marker has its name by then, and its file is durable: the run fails, the shard counts as committed."""
    calls = watched_run(images, tmp_path / "undisturbed", config)
    link = next(i for i, (name, given) in enumerate(calls) if name == "link" and SHARD in str(given[1]))
    sync = next(i for i in range(link, len(calls)) if calls[i][0] == "fsync")
    first_run_fails(images, tmp_path / "labels", config, sync, errno.EIO, once=True)
    before = state(tmp_path / "labels")
    marker = read_marker(tmp_path / "labels", 1, 3)
    assert marker is not None
    label_images(images, tmp_path / "labels", config)
    assert before.items() <= state(tmp_path / "labels").items()
    assert_undisturbed(10, tmp_path / "labels", tmp_path / "undisturbed", injected=1)


@pytest.mark.fault(9)
def test_a_file_size_limit_is_an_error_and_not_a_loss(images, tmp_path, config):
    store, config = tmp_path / "labels", dataclasses.replace(config, shard_size=12, batch_size=2)

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_500, 6_500))  # the plan is smaller, the shard larger
        return main(arguments(images, store, "--shard-size", "12"))

    status, error = in_own_process(tmp_path / "errors", limited)
    assert status == 1
    assert "File too large" in error
    assert "Traceback" not in error
    assert not list(store.glob(".tmp-*"))
    label_images(images, store, config)
    label_images(images, tmp_path / "undisturbed", config)
    assert_undisturbed(9, store, tmp_path / "undisturbed", injected=1)


def with_mount(work: Callable[[Callable[..., int]], int]) -> int:
    """Call `work` with `mount(source, target, type, flags, options)`, seen by this process alone. 99: not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    own_namespace, private = 0x20000, (1 << 14) | (1 << 18)

    def mount(source: str, target: Path | str, kind: str | None, flags: int, options: str = "") -> int:
        return libc.mount(source.encode(), str(target).encode(), kind and kind.encode(), flags, options.encode())

    if libc.unshare(own_namespace) or mount("none", "/", None, private):
        return 99
    return work(mount)


@pytest.mark.fault(9)
def test_a_full_disk_is_an_error_and_not_a_loss(images, tmp_path, config):
    """A real small file system, which grows before the next run."""
    store, kept = tmp_path / "disk" / "labels", tmp_path / "kept"
    store.parent.mkdir()
    config = dataclasses.replace(config, shard_size=2, batch_size=2)

    def label(mount: Callable[..., int]) -> int:
        if mount("tmpfs", store.parent, "tmpfs", 0, "size=48k"):
            return 99
        status = main(arguments(images, store, "--shard-size", "2"))
        print("status", status, "markers", len(list(store.glob("shard-*.json"))))
        print("left over", [p.name for p in store.glob(".tmp-*")])
        remount = 1 << 5
        assert not mount("tmpfs", store.parent, "tmpfs", remount, "size=1m")
        before = state(store)
        label_images(images, store, config)
        assert before.items() <= state(store).items()
        kept.mkdir()
        for path in store.iterdir():
            (kept / path.name).write_bytes(path.read_bytes())
        return 0

    status, text = in_own_process(tmp_path / "errors", lambda: with_mount(label))
    if status == 99:
        pytest.skip("mounting is not permitted here")
    assert status == 0, text
    assert "No space left on device" in text
    assert "Traceback" not in text
    assert "status 1 markers" in text
    assert "markers 0" not in text
    assert "left over []" in text
    label_images(images, tmp_path / "undisturbed", config)
    assert_undisturbed(9, kept, tmp_path / "undisturbed", injected=1)
    assert verify_store(kept, images).problems == ()
