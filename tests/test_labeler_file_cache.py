"""The cache of remote files: what is pinned stays, what was used the longest ago goes, and processes share it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from labeler import InputError, IntegrityError
from labeler.remote.file_cache import FileCache
from labeler.remote.file_systems import FileIdentity
from labeler.remote.remote_files import RemoteFolder


@pytest.fixture
def cache(tmp_path) -> FileCache:
    return FileCache(tmp_path / "cache", limit=100)


@pytest.fixture
def remote(tmp_path) -> RemoteFolder:
    remote = RemoteFolder(f"file://{tmp_path}/remote")
    for number in range(5):
        remote.put(f"{number}.bin", bytes([number]) * 40)
    return remote


def copies(cache: FileCache) -> list[str]:
    return sorted(path.name for path in (cache.root / "files").rglob("*") if path.is_file())


def fetched(cache: FileCache, remote: RemoteFolder, name: str) -> Path:
    """Fetches a file, and lets it go at once."""
    path = cache.fetch(remote, name)
    cache.release(path.parent)
    return path


def test_a_copy_is_fetched_once_and_again_when_the_file_changes(cache, remote):
    first = fetched(cache, remote, "1.bin")
    stamp = first.stat().st_ino
    assert fetched(cache, remote, "1.bin").stat().st_ino == stamp
    remote.put("1.bin", b"new")
    second = fetched(cache, remote, "1.bin")
    assert (second.name, second.read_bytes(), first.read_bytes()) == ("1.bin", b"new", b"\1" * 40)


def test_what_was_used_the_longest_ago_makes_room(cache, remote):
    one = fetched(cache, remote, "1.bin")
    fetched(cache, remote, "2.bin")
    os.utime(one, ns=(1, 1))
    fetched(cache, remote, "1.bin")  # used again
    fetched(cache, remote, "3.bin")
    assert copies(cache) == ["1.bin", "3.bin"]
    assert len(list((cache.root / "files").iterdir())) == 2


def test_what_is_pinned_stays_and_too_much_of_it_is_told(cache, remote):
    held = [cache.fetch(remote, name) for name in ("1.bin", "2.bin")]
    with pytest.raises(InputError, match=r"is too small: got 40 bytes more beside 80 that are in use, expected 100 in"):
        cache.fetch(remote, "3.bin")
    cache.fetch(remote, "1.bin")  # twice
    cache.release(held[0].parent)
    with pytest.raises(InputError, match="TOKEN_LABELING_CACHE_BYTES=200G"):
        cache.fetch(remote, "3.bin")
    cache.release(held[1].parent)
    cache.fetch(remote, "3.bin")
    assert copies(cache) == ["1.bin", "3.bin"]


def test_another_process_removes_nothing_that_this_one_has_pinned(cache, remote):
    cache.fetch(remote, "1.bin")
    code = (
        "import sys; from labeler.remote.file_cache import FileCache; from labeler.remote.remote_files import *\n"
        "cache = FileCache(sys.argv[1], 100); remote = RemoteFolder(sys.argv[2])\n"
        "for name in sys.argv[3:]: cache.release(cache.fetch(remote, name).parent)\n"
        "cache.fetch(remote, '4.bin'); print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(cache.root), remote.url, "2.bin", "3.bin"]
    child = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    assert copies(cache) == ["1.bin", "4.bin"]
    with pytest.raises(InputError, match="beside 80 that are in use"):
        cache.fetch(remote, "2.bin")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    cache.fetch(remote, "2.bin")  # what a killed process held is free
    assert copies(cache) == ["1.bin", "2.bin"]


def test_a_copy_that_was_damaged_here_is_fetched_again(cache, remote):
    right = hashlib.sha256(b"\1" * 40).hexdigest()
    path = cache.fetch(remote, "1.bin", sha256=right)
    path.write_bytes(b"\2" * 40)
    assert cache.fetch(remote, "1.bin", sha256=right).read_bytes() == b"\1" * 40
    with pytest.raises(IntegrityError, match=r"2\.bin is damaged"):
        cache.fetch(remote, "2.bin", sha256=right)
    assert copies(cache) == ["1.bin"]


def test_threads_and_processes_fetch_the_same_file_at_once(tmp_path, remote):
    cache, found = FileCache(tmp_path / "cache", limit=10_000), []
    threads = [threading.Thread(target=lambda: found.append(cache.fetch(remote, "1.bin"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert {path.read_bytes() for path in found} == {b"\1" * 40}
    assert copies(cache) == ["1.bin"]


def test_a_killed_download_leaves_nothing_that_counts_for_ever(cache, remote):
    folder = cache.folder("somewhere")
    folder.mkdir(parents=True)
    (folder / ".tmp-99-abc").write_bytes(b"x" * 90)
    cache.fetch(remote, "1.bin")
    assert copies(cache) == ["1.bin"]


def test_folder_and_limit_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKEN_LABELING_CACHE", str(tmp_path / "there"))
    monkeypatch.setenv("TOKEN_LABELING_CACHE_BYTES", "1.5 GB")
    assert (FileCache().root, FileCache().limit) == (tmp_path / "there", 1_500_000_000)
    monkeypatch.setenv("TOKEN_LABELING_CACHE_BYTES", "plenty")
    with pytest.raises(InputError, match="TOKEN_LABELING_CACHE_BYTES is not a size: got 'plenty'"):
        FileCache()


def test_a_name_from_elsewhere_cannot_leave_the_cache(cache, tmp_path):
    remote = RemoteFolder(f"file://{tmp_path}/remote")
    remote.put("sub/ä b.bin", b"1")
    path = cache.fetch(remote, "sub/ä b.bin", FileIdentity(1, remote.identity("sub/ä b.bin").mark))
    assert path.is_relative_to(cache.root)
    assert path.name.endswith("__b.bin")
    assert path.name.isascii()


def test_a_full_disk_is_told_and_leaves_no_part(cache, remote, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RemoteFolder, "download", full)
    with pytest.raises(InputError, match="does not fit on the disk of the cache"):
        cache.fetch(remote, "1.bin")
    assert copies(cache) == []
