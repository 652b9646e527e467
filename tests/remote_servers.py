"""Servers of the tests' own: HTTP with ranges that can fail in every way, and an S3 service of moto's."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

needs_http = pytest.mark.skipif(find_spec("aiohttp") is None, reason="aiohttp is not installed (extra: remote)")
needs_s3 = pytest.mark.skipif(
    find_spec("s3fs") is None or find_spec("moto") is None, reason="s3fs or moto[server] is not installed"
)


class FlakyServer(ThreadingHTTPServer):
    """Serves a folder's files.

    Attributes:
        faults: What happens to the next requests whose path contains a text: (text, fault) pairs, each used once.
            Faults: an HTTP status, "drop" (half of the body, then the connection ends), "cut" (a whole answer of half
            the length), "flip" (other bytes), "hang up" (no answer at all).
        ranges: Whether it serves ranges.
        asked: (method, path, range) of every request.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, True
        self.faults: list[tuple[str, str | int]] = []
        self.asked: list[tuple[str, str, str | None]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault_of(self, path: str) -> str | int | None:
        with self.lock:
            for fault in self.faults:
                if fault[0] in path:
                    self.faults.remove(fault)
                    return fault[1]
        return None


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, path = self.server, unquote(self.path.partition("?")[0])
        server.asked.append((self.command, path, self.headers["Range"]))
        fault = server.fault_of(path) if body else None
        file = server.folder / path.lstrip("/")
        if fault == "hang up":
            self.close_connection = True
            return
        if isinstance(fault, int) or not file.is_file():
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = file.read_bytes(), file.stat()
        total, first, last = len(data), 0, len(data) - 1
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "") if server.ranges else None
        if found:
            first, last = int(found[1]), min(int(found[2] or last), last)
            data = data[first : last + 1]
        if fault == "flip":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "cut":
            data = data[: len(data) // 2]
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{status.st_mtime_ns}-{total}"')
        if server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if fault == "drop" else data)
            self.close_connection |= fault == "drop"


@contextmanager
def flaky_server(folder: Path) -> Iterator[FlakyServer]:
    """A server that runs while the block does."""
    server = FlakyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """moto's S3 service, with an empty bucket; fsspec and its processes are pointed at it. Yields the bucket's URL."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
        yield "s3://bucket"
    finally:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
