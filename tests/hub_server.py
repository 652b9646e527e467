"""A Hugging Face Hub of the tests' own: the calls by which `huggingface_hub` makes a repository, commits and reads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "1" * 40


class Hub(ThreadingHTTPServer):
    """Attributes:
    repos: name -> path -> content.
    commits: (repository, paths) of each commit.
    private: Whether each repository was made private.
    failures: How many of the next commits are answered 503.
    asked: Method and path of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, list[str]]] = []
        self.private: dict[str, bool] = {}
        self.failures = 0
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._do()

    def do_GET(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, [wanted.get("organization"), wanted["name"]]))
            name = name if "/" in name else f"user/{name}"
            known = name in self.server.repos
            self.server.repos.setdefault(name, {".gitattributes": b"*.h5 filter=lfs"})
            self.server.private.setdefault(name, wanted.get("private") or wanted.get("visibility") == "private")
            url = f"{self.server.url}/datasets/{name}"
            return self._json({"url": url, "name": name, "id": name}, 409 if known else 200)
        if path == "/api/whoami-v2":
            return self._json({"name": "user", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(\w+(?:-\w+)?)/([^/]+)(?:/(.*))?)?", path)
        if found and found[1] in self.server.repos:
            return self._api(found[1], found[2], (found[4] or "").strip("/"), body)
        found = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)  # without it: a model's file
        data = self.server.repos.get(found[1], {}).get(found[2]) if found else None
        if data is None:
            return self._json(
                {"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound" if not found else "EntryNotFound"}
            )
        return self._file(data)

    def _api(self, repo: str, what: str | None, path: str, body: bytes) -> None:
        files = self.server.repos[repo]
        if what == "preupload":
            wanted = [file["path"] for file in json.loads(body)["files"]]
            return self._json(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in wanted]}
            )
        if what == "commit":
            if self.server.failures:
                self.server.failures -= 1
                return self._json({"error": "busy"}, 503)
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            added = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
            }
            files.update(added)
            self.server.commits.append((repo, sorted(added)))
            url = f"{self.server.url}/datasets/{repo}/commit/{REVISION}"
            return self._json({"commitUrl": url, "commitOid": REVISION, "success": True})
        if what == "tree":
            below = [name for name in files if not path or name.startswith(f"{path}/")]
            flat = [name for name in below if "/" not in name[len(path) + 1 if path else 0 :]]
            if path and not below:
                return self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self._json([_entry(name, files[name]) for name in flat])
        return self._json({"id": repo, "sha": REVISION, "private": True, "siblings": [{"rfilename": n} for n in files]})

    def _file(self, data: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        part = data[int(found[1]) : int(found[2] or len(data)) + 1] if found else data
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {found[1]}-{int(found[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    def _json(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {
            **(headers or {}),
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A Hub that runs while the block does."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
