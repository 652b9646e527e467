"""Training processes that cost a fork instead of an import of torch, and that end where a test wants them to.

Run as a program it is the server that forks: one request, a JSON object, on each line of its standard input.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.ranks.launch import free_port

# System calls of a checkpoint, as Python names the functions that make them.
CALLS = frozenset({"open", "write", "fsync", "close", "mkdir", "rename", "rmdir", "unlink"})
PATIENCE = 120  # seconds until a process counts as one that hangs


@dataclass(frozen=True)
class Blow:
    """A signal that a process of `rank` sends itself right before the `call`-th call of a function.

    place  "module:name" or "module:class.name"
    within a count of system calls into that call after which it comes, or None: before the call itself
    half   of a place that gets bytes as its last argument: let it have the first half of them
    """

    place: str
    call: int = 1
    within: int | None = None
    half: bool = False
    rank: int = 0
    number: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """One process: its exit status (−9 for SIGKILL), what it wrote, and seconds from its start to its end."""

    status: int
    errors: str
    seconds: float


class Forks:
    """The server, from the side of the tests."""

    def __init__(self) -> None:
        self._folder, self._count = tempfile.TemporaryDirectory(), 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        target: str,
        *arguments: Any,
        ranks: int = 1,
        blow: Blow | None = None,
        environment: dict[str, str] | None = None,
        file_size: int | None = None,
    ) -> list[Ended]:
        """Call "module:function" in a process of each rank. file_size: the largest file that it may write, bytes."""
        self._count += 1
        request = {
            "target": target,
            "arguments": arguments,
            "ranks": ranks,
            "blow": blow and asdict(blow),
            "environment": environment or {},
            "file_size": file_size,
            "errors": f"{self._folder.name}/errors-{self._count}",
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self._process.stdout.readline())]

    def fit(self, recipe: Path, *arguments: str, **options: Any) -> list[Ended]:
        """`python -m train fit`, one process for each rank."""
        return self.run("train.__main__:main", ["fit", str(recipe), *arguments], **options)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()


@functools.cache
def forks() -> Forks:
    """One server for all tests of a session: starting it takes seconds."""
    found = Forks()
    atexit.register(found.close)
    return found


def _serve() -> None:
    import tiny_runs  # noqa: F401
    import torch

    import train.__main__
    import train.trainer  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_all_ranks(request)) + "\n")
        answers.flush()


def _all_ranks(request: dict[str, Any]) -> list[dict[str, Any]]:
    port, began = free_port(), time.monotonic()
    children: dict[int, int] = {}
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            _child(request, rank, port)
        children[pid] = rank
    ended: dict[int, dict[str, Any]] = {}
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = children.pop(pid)
            text = Path(f"{request['errors']}-{rank}").read_text()
            ended[rank] = {
                "status": os.waitstatus_to_exitcode(status), "errors": text, "seconds": time.monotonic() - began
            }  # fmt: skip
        elif time.monotonic() - began > PATIENCE:
            for hanging in children:
                os.kill(hanging, signal.SIGABRT)
        else:
            time.sleep(0.005)
    return [ended[rank] for rank in sorted(ended)]


def _child(request: dict[str, Any], rank: int, port: int) -> None:
    """Never returns."""
    status = 99
    try:
        errors = os.open(f"{request['errors']}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        if request["ranks"] > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"})
        os.environ.update(request["environment"])
        if request["file_size"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
        if request["blow"] and request["blow"]["rank"] == rank:
            prepare(Blow(**request["blow"]))
        module, name = request["target"].split(":")
        status = getattr(importlib.import_module(module), name)(*request["arguments"]) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def prepare(blow: Blow) -> None:
    """Put a blow in its place, in this process."""
    module, path = blow.place.split(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    def strike() -> None:
        os.kill(os.getpid(), blow.number)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == blow.call and blow.half:
            original(*args[:-1], args[-1][: len(args[-1]) // 2])
            strike()
        elif calls == blow.call and blow.within is not None:
            with _watched(blow.within, strike):
                return original(*args, **kwargs)
        elif calls == blow.call:
            strike()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


@contextmanager
def _watched(count: int, strike: Callable[[], None]) -> Iterator[None]:
    """Within it, `strike` comes right before the system call after `count` others."""
    seen = 0

    def watch(frame: Any, event: str, function: Any) -> None:
        nonlocal seen
        if event == "c_call" and function.__name__ in CALLS:
            if seen == count:
                strike()
            seen += 1

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve()
