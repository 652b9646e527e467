"""Files behind URLs and their cache, on real servers that fail in every way."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from remote_servers import FlakyServer, flaky_server, needs_http, needs_s3, s3_service

from labeler import InputError, IntegrityError
from labeler.base.errors import RemoteError
from labeler.remote import file_systems, remote_files
from labeler.remote.failures import NotThere, Patience
from labeler.remote.remote_files import RemoteFolder
from labeler.remote.urls import is_url, path_or_url, split_url

QUICK = Patience(tries=4, seconds=20, first=0.01, longest=0.05)
DATA = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/data.bin").write_bytes(DATA)
    with flaky_server(tmp_path / "served") as server:
        yield server


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=needs_s3)])
def folder(request, tmp_path, monkeypatch) -> RemoteFolder:
    """An empty folder that can be written."""
    if request.param == "s3":
        with s3_service(monkeypatch) as url:
            yield RemoteFolder(f"{url}/a/b", QUICK)
    else:
        path = tmp_path / "remote" if request.param == "file" else f"/{tmp_path.name}"
        yield RemoteFolder(f"{request.param}://{path}", QUICK)


def http(server: FlakyServer) -> RemoteFolder:
    return RemoteFolder(server.url, QUICK)


def test_urls_are_told_from_paths():
    assert is_url("s3://bucket/labels")
    assert is_url("hf://datasets/user/name")
    assert not any(map(is_url, ("labels", "/a/b", "C:\\labels", "a:b", "//a/b")))
    assert path_or_url("s3://a/b") == "s3://a/b"
    assert path_or_url("a/b") == Path("a/b")
    assert split_url("https://a/b/c.tar?token=1/2") == ("https://a/b", "c.tar?token=1/2")


def test_a_file_is_put_looked_at_read_listed_and_deleted(folder, tmp_path):
    (tmp_path / "local.bin").write_bytes(DATA)
    assert folder.files() == {}
    folder.put("one.bin", b"old")
    folder.put("one.bin", tmp_path / "local.bin")
    folder.put("two.bin", b"")
    assert {name: known.size for name, known in folder.files().items()} == {"one.bin": len(DATA), "two.bin": 0}
    assert folder.files()["one.bin"] == folder.identity("one.bin")
    assert folder.read("one.bin") == DATA
    assert folder.read("one.bin", 1000, 24) == DATA[1000:1024]
    assert folder.read_ranges("one.bin", [(5, 2), (0, 0), (9, None)], folder.identity("one.bin")) == [
        DATA[5:7], b"", DATA[9:],
    ]  # fmt: skip
    assert folder.read("two.bin") == b""
    folder.delete("one.bin")
    folder.delete("one.bin")
    assert not folder.exists("one.bin")
    assert folder.exists("two.bin")
    with pytest.raises(NotThere, match=r"one\.bin is not there"):
        folder.read("one.bin")


def test_a_pickled_folder_reads_the_same(folder):
    folder.put("one.bin", DATA)
    assert pickle.loads(pickle.dumps(folder)).read("one.bin", 3, 4) == DATA[3:7]


def test_more_than_there_is_cannot_be_read(folder):
    folder.put("one.bin", DATA)
    with pytest.raises(RemoteError, match=f"one.bin is too short: got {len(DATA)} bytes, expected {len(DATA) + 1} or"):
        folder.read("one.bin", 1, len(DATA))


def test_a_file_that_changes_between_two_reads_is_refused_by_name(folder):
    folder.put("one.bin", DATA)
    known = folder.identity("one.bin")
    assert folder.read("one.bin", 0, 4, known) == DATA[:4]
    time.sleep(1.1 if folder.protocol == "s3" else 0.01)
    folder.put("one.bin", DATA[::-1])
    with pytest.raises(RemoteError, match=r"one\.bin has changed while it was read"):
        folder.read("one.bin", 4, 4, known)


@pytest.mark.parametrize("name", ["../one.bin", "/etc/passwd", "a//b", "a/./b", "", "a\\b", "a\nb"])
def test_a_name_cannot_leave_its_folder(name, tmp_path):
    with pytest.raises(InputError, match="is not a name below"):
        RemoteFolder(f"file://{tmp_path}").read(name)


@pytest.mark.parametrize("ends", ["in the middle", "before it has its name"])
def test_nothing_half_written_is_seen_in_a_plain_folder(tmp_path, monkeypatch, ends):
    remote = RemoteFolder(f"file://{tmp_path}/remote", Patience(tries=1))
    remote.put("one.bin", b"old")

    def half(fs, path, source):
        fs.pipe_file(path, source[: len(source) // 2])
        raise OSError(5, "the cable is out")

    def no_name(source, target):
        raise OSError(5, "the cable is out")

    monkeypatch.setattr(*((file_systems, "write", half) if ends == "in the middle" else (os, "replace", no_name)))
    with pytest.raises(RemoteError, match="the cable is out"):
        remote.put("one.bin", b"new" * 1000)
    assert [path.name for path in (tmp_path / "remote").iterdir()] == ["one.bin"]
    assert remote.read("one.bin") == b"old"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("gs://bucket/a", "gs://bucket/a needs a driver that is not installed. pip install gcsfs"),
        ("xyz://a", "xyz://a cannot be opened: got Protocol not known: xyz, expected a URL such as s3://… or hf://…"),
    ],
)
def test_a_driver_that_is_not_there_is_named_in_one_line(url, text):
    with pytest.raises(InputError) as raised:
        RemoteFolder(url)
    assert str(raised.value) == text


def test_an_address_that_the_hub_does_not_know_is_told_in_one_line():
    pytest.importorskip("huggingface_hub")
    with pytest.raises(InputError, match=r"^hf://datasets/a\S* is no address: got .*expected hf://datasets/USER/NAME"):
        RemoteFolder("hf://datasets/a", QUICK).files()


def test_without_fsspec_the_extra_is_named():
    code = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from labeler.remote.remote_files import RemoteFolder\n"
        "try: RemoteFolder('s3://a')\n"
        "except Exception as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "s3://a needs fsspec, which is not installed. pip install 'token-labeling[remote]'\n"


@needs_http
@pytest.mark.parametrize("fault", [503, 500, 429, "drop", "cut", "hang up"])
def test_a_passing_failure_is_tried_again_and_told(server, fault, caplog):
    remote = http(server)
    server.faults = [("data.bin", fault)] * 2
    with caplog.at_level(logging.WARNING, "labeler"):
        assert remote.read("data.bin", 100, 1000) == DATA[100:1100]
    assert not server.faults
    told = [record.getMessage() for record in caplog.records if record.name == "labeler"]
    assert len(told) == (1 if fault == "hang up" else 2)  # aiohttp tries that once by itself
    assert told[0].startswith(f"{server.url}/data.bin: ")
    assert "try 2 of 4 in" in told[0]


@needs_http
def test_what_keeps_failing_is_given_up_by_name(server):
    server.faults = [("data.bin", 503)] * 50
    with pytest.raises(RemoteError, match=r"/data.bin cannot be reached: got answer 503 in each of 4 tries\. "):
        http(server).read("data.bin", 0, 10)
    server.faults = [("data.bin", "cut")] * 50
    with pytest.raises(RemoteError, match=r"/data.bin cannot be reached: got 5 bytes instead of 10 from byte 0 on in"):
        http(server).read("data.bin", 0, 10)


@needs_http
def test_time_bounds_the_tries(server):
    server.faults = [("data.bin", 503)] * 1000
    started = time.monotonic()
    with pytest.raises(RemoteError, match="in each of"):
        RemoteFolder(server.url, Patience(tries=1000, seconds=0.5, first=0.1, longest=0.1)).read("data.bin", 0, 10)
    assert time.monotonic() - started < 5


@needs_http
@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (404, NotThere, "is not there"), (403, InputError, "there is no permission for"),
        (401, InputError, "there is no permission for"), (400, InputError, "is refused by its service"),
    ],
)  # fmt: skip
def test_what_no_other_try_can_cure_is_told_at_once(server, status, kind, text):
    remote = http(server)
    known = remote.identity("data.bin")
    server.faults = [("data.bin", status)] * 50
    before = len(server.asked)
    with pytest.raises(kind, match=text):
        remote.read("data.bin", 0, 10, known)
    assert len(server.asked) == before + 1


@needs_http
def test_a_server_that_is_not_there_is_told_after_bounded_tries(server):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(RemoteError, match="cannot be reached"):
        RemoteFolder(url, QUICK).read("data.bin")


@needs_http
def test_a_server_without_ranges_gives_the_same_bytes(server, tmp_path):
    server.ranges = False
    assert http(server).read("data.bin", 100, 50) == DATA[100:150]
    http(server).download("data.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA


@needs_http
def test_a_server_can_only_be_read(server):
    with pytest.raises(InputError, match="can only be read"):
        http(server).put("new.bin", b"1")


@needs_http
def test_names_with_unusual_characters_are_found(server):
    for name in ("a b.bin", "a#b.bin", "100%25.bin", "größe.bin"):
        (server.folder / name).write_bytes(name.encode())
        assert http(server).read(name) == name.encode()


@needs_http
def test_a_download_goes_on_where_it_was(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files, "BLOCK", 1000)
    server.faults = [("data.bin", "drop")] * 2
    digest = http(server).download("data.bin", tmp_path / "copy")
    assert digest == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "copy").read_bytes() == DATA
    parts = [part for method, _, part in server.asked if method == "GET"]
    assert len(parts) == -(-len(DATA) // 1000) + 2
    assert len(set(parts)) == -(-len(DATA) // 1000)


@needs_http
def test_other_bytes_are_read_again_and_then_refused_by_name(server, tmp_path):
    right = hashlib.sha256(DATA).hexdigest()
    server.faults = [("data.bin", "flip")]
    assert http(server).download("data.bin", tmp_path / "copy", sha256=right) == right
    server.faults = [("data.bin", "flip")] * 10
    with pytest.raises(IntegrityError, match=r"/data.bin is damaged: got sha256 \w{12}, expected sha256 " + right[:12]):
        http(server).download("data.bin", tmp_path / "copy", sha256=right)


@needs_http
def test_a_file_that_is_replaced_during_a_download_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files, "BLOCK", 1000)
    remote = http(server)
    known = remote.identity("data.bin")
    (server.folder / "data.bin").write_bytes(DATA[::-1])
    os.utime(server.folder / "data.bin", (1, 1))
    with pytest.raises(RemoteError, match=r"data\.bin has changed while it was read"):
        remote.download("data.bin", tmp_path / "copy", known)


@needs_s3
def test_a_bucket_that_is_not_there_and_one_without_permission(monkeypatch):
    with s3_service(monkeypatch):
        with pytest.raises(NotThere, match="s3://nowhere/a/x is not there"):
            RemoteFolder("s3://nowhere/a", QUICK).read("x")
        assert RemoteFolder("s3://nowhere/a", QUICK).files() == {}


@needs_http
def test_a_fork_reads_on_its_own(server):
    remote = http(server)
    assert remote.read("data.bin", 0, 4) == DATA[:4]
    child = os.fork()
    if not child:
        os._exit(0 if remote.read("data.bin", 4, 4) == DATA[4:8] else 1)
    assert os.waitpid(child, 0)[1] == 0
