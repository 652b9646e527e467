"""Where shards are labeled: in this process, or by Ray actors. The only file that imports Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from labeler.base.cores import usable_cores
from labeler.base.errors import InputError, LabelingError, TokenLabelError
from labeler.base.freed_memory import freed_memory_kept, keep_freed_memory
from labeler.config import LabelerConfig
from labeler.store.plan import Plan
from labeler.worker import ShardLabeler, ShardResult, ShardTask

log = logging.getLogger("labeler")

# Tells how many more images are done: after each batch in this process, after each shard on Ray; 0 when work begins.
Advance = Callable[[int], None]

# Seconds after which an actor that runs, but of which this process has heard nothing, counts as unheard of.
PATIENCE = 60.0


def run_in_process(
    tasks: list[ShardTask], root: Path, store: Path, plan: Plan, config: LabelerConfig, device: str, advance: Advance
) -> Iterator[ShardResult]:
    """Label the shards one after the other."""
    with freed_memory_kept(device == "cpu"):
        labeler = ShardLabeler(root, store, plan, config, device, config.threads or usable_cores())
        advance(0)
        for task in tasks:
            try:
                yield labeler(task, advance)
            except TokenLabelError:
                raise
            except Exception as error:
                raise LabelingError(
                    f"shard {task.shard} (images {task.keys[0]!r} to {task.keys[-1]!r}) could not be labeled",
                    got=f"{type(error).__name__}: {error}",
                    remedy="The shards before it are committed; the same command goes on from there.",
                ) from error


def refuse_absent_ray() -> None:
    """Before a teacher is built, which takes longer."""
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("workers need Ray. pip install 'token-labeling[label]'", name="ray")


def run_on_ray(
    tasks: list[ShardTask], root: Path, store: Path, plan: Plan, config: LabelerConfig, device: str, advance: Advance
) -> Iterator[ShardResult]:
    """Label the shards with `config.workers` actors, each holding a teacher; results come as shards are finished.

    Actors that the cluster has no room for wait until it has, so workers come and go with the nodes. Errors that every
    worker would meet (a wrong checkpoint, a full disk) end the run at once. A shard over which workers die, or which
    fails otherwise, is tried `config.max_attempts` times; the others are finished before LabelingError names it.
    """
    import ray

    ours = not ray.is_initialized()
    unfinished = {task.shard: task for task in tasks}
    while unfinished:
        if ours:
            with _own_signal_handlers():
                _connect(config.ray_address, (config.threads or 1) * config.workers)
        gpus = config.gpus_per_worker if device.startswith("cuda") else 0
        threads = _threads([node["Resources"] for node in ray.nodes() if node["Alive"]], gpus, config)
        worker = ray.remote(num_cpus=threads, num_gpus=gpus)(_Worker)
        paths = [os.path.abspath(path) for path in sys.path]
        arguments = (paths, device == "cpu", root.absolute(), store.absolute(), plan, config, device, threads)
        pool = _Pool(ray, partial(worker.remote, *arguments), list(unfinished.values()), config, advance)
        try:
            for result in pool.results():
                del unfinished[result.shard]
                yield result
        except _UnheardError as error:
            if not ours:
                raise
            log.warning("%s; connecting to Ray anew", error.problem)
        finally:
            pool.close()
            if ours:
                ray.shutdown()


class _UnheardError(LabelingError):
    """Ray runs an actor, but never told this process. From then on it tells it nothing more of any actor."""


class _Worker:
    """The actor. It loads the teacher in its first call, whose errors reach the driver as themselves."""

    def __init__(self, paths: list[str], keep_memory: bool, *arguments: Any) -> None:
        # A teacher given as module:function may lie where only the driver looks for modules.
        sys.path += [path for path in paths if path not in sys.path and os.path.isdir(path)]
        self.arguments, self.keep_memory = arguments, keep_memory
        self.labeler: ShardLabeler | None = None

    def greet(self) -> None:
        """Return at once: what comes back shows that this process and its driver hear each other."""

    def prepare(self) -> None:
        if self.keep_memory:
            keep_freed_memory()
        self.labeler = ShardLabeler(*self.arguments)

    def label(self, task: ShardTask) -> ShardResult:
        assert self.labeler is not None, "prepare comes first"
        return self.labeler(task)


class _Pool:
    """Hands shards to actors, replaces actors that died, and counts how often each shard was tried.

    Ray's own restarts and retries stay off: they would retry an actor that the kernel kills for its memory for ever.
    """

    def __init__(
        self, ray: Any, start: Callable[[], Any], tasks: list[ShardTask], config: LabelerConfig, advance: Advance
    ) -> None:
        self.ray, self.start, self.config, self.advance = ray, start, config, advance
        self.waiting = deque(tasks)
        self.unfinished = len(tasks)
        self.attempts: Counter[int] = Counter()
        self.failed_starts = 0
        self.given_up: dict[int, tuple[ShardTask, str]] = {}
        self.idle: list[Any] = []
        # A call under way -> its actor and its shard, or None for an actor that loads its teacher.
        self.running: dict[Any, tuple[Any, ShardTask | None]] = {}
        # A greeting that has not come back -> its actor, and whether that was seen to run at the last look.
        self.greetings: dict[Any, tuple[Any, bool]] = {}
        self.looked = time.monotonic()
        for _ in range(min(config.workers, len(tasks))):
            self._start_actor()

    def results(self) -> Iterator[ShardResult]:
        while self.unfinished:
            while self.waiting and self.idle:
                actor, task = self.idle.pop(), self.waiting.popleft()
                self.running[actor.label.remote(task)] = (actor, task)
            call = self._next_finished()
            result = self._finish(call, *self.running.pop(call))
            if result is not None:
                yield result
        if self.given_up:
            raise self._failure()

    def _next_finished(self) -> Any:
        while True:
            try:
                # Ray may look at signals between its waits only, so none is long.
                finished, _ = self.ray.wait(list(self.running), num_returns=1, timeout=1)
            except SystemError as error:
                # What a signal handler raises while Ray waits comes out wrapped in this.
                raise error.__cause__ or error from None
            if finished:
                return finished[0]
            if time.monotonic() > self.looked + PATIENCE / 2:
                self._look_for_unheard_actors()

    def _look_for_unheard_actors(self) -> None:
        """Raise _UnheardError where Ray has run an actor since the last look, but no greeting came back from it."""
        for greeting, (actor, was_running) in list(self.greetings.items()):
            running = _runs(actor)
            if self.ray.wait([greeting], timeout=0)[0]:
                del self.greetings[greeting]
            elif running and was_running:
                raise _UnheardError(
                    "Ray does not tell this process of its workers",
                    got=f"a worker that has run for {PATIENCE / 2:g} seconds and more without a word",
                    remedy="All finished shards are committed; the same command goes on from there.",
                )
            else:
                self.greetings[greeting] = (actor, running)
        self.looked = time.monotonic()

    def close(self) -> None:
        for actor in [*self.idle, *(actor for actor, _ in self.running.values())]:
            # Losing the connection to Ray is one of the ways to get here.
            with contextlib.suppress(Exception):
                self.ray.kill(actor)

    def _start_actor(self) -> None:
        actor = self.start()
        self.greetings[actor.greet.remote()] = (actor, False)
        self.running[actor.prepare.remote()] = (actor, None)

    def _finish(self, call: Any, actor: Any, task: ShardTask | None) -> ShardResult | None:
        try:
            result = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            if task is None or isinstance(cause, TokenLabelError):
                raise cause from None
            # After an error of its GPU a process fails at everything, and fast: it would use up every shard's attempts.
            self.ray.kill(actor)
            self._start_actor()
            self._retry(task, f"{type(cause).__name__}: {cause}")
            return None
        except self.ray.exceptions.RayError as error:
            self._start_actor()
            reason = str(error).strip().splitlines()[0]
            if task is None:
                self._count_failed_start(reason)
            else:
                self._retry(task, reason)
            return None
        self.idle.append(actor)
        if task is None:
            self.advance(0)
            return None
        self.unfinished -= 1
        self.failed_starts = 0
        self.advance(len(task.keys))
        return result

    def _retry(self, task: ShardTask, reason: str) -> None:
        self.attempts[task.shard] += 1
        tried, allowed = self.attempts[task.shard], self.config.max_attempts
        log.warning("shard %d failed, attempt %d of %d: %s", task.shard, tried, allowed, reason)
        if tried < allowed:
            self.waiting.append(task)
        else:
            self.given_up[task.shard] = (task, reason)
            self.unfinished -= 1

    def _count_failed_start(self, reason: str) -> None:
        self.failed_starts += 1
        if self.failed_starts >= self.config.max_attempts * self.config.workers:
            raise LabelingError(
                "the workers die while they load the teacher",
                got=f"{self.failed_starts} deaths, the last: {reason}",
                remedy="Try one worker, more memory, or a smaller teacher.",
            )

    def _failure(self) -> LabelingError:
        shard = min(self.given_up)
        task, reason = self.given_up[shard]
        return LabelingError(
            f"{len(self.given_up)} shard(s) could not be labeled, "
            f"first shard {shard} (images {task.keys[0]!r} to {task.keys[-1]!r})",
            got=f"{self.config.max_attempts} failures, the last: {reason}",
            remedy="All other shards are committed. Look for an image that crashes the teacher or exhausts the memory.",
        )


def _runs(actor: Any) -> bool:
    """Whether Ray's head says that the actor runs. It is asked, where all else waits for what it tells by itself."""
    # Ray's public way to ask needs its dashboard. Without an answer the run waits on.
    with contextlib.suppress(Exception):
        from ray._private import state

        return bool(state.actors(actor._actor_id.hex())["State"] == "ALIVE")
    return False


def _threads(nodes: list[dict[str, float]], gpus: float, config: LabelerConfig) -> int:
    """CPUs of each worker: as set, else the most with which all workers find room. Warns where none finds any."""
    usable = [(int(node.get("CPU", 0)), node.get("GPU", 0)) for node in nodes if node.get("GPU", 0) >= gpus]
    most = max((cpus for cpus, _ in usable), default=0)

    def room(threads: int) -> int:
        return sum(cpus // threads if not gpus else int(min(cpus // threads, gpu // gpus)) for cpus, gpu in usable)

    workers = min(config.workers, room(1))
    threads = config.threads or next((count for count in range(most, 0, -1) if room(count) >= workers), 1)
    if threads > most:
        log.warning(
            "the run waits: no node of the Ray cluster has %d CPU(s) and %g GPU(s) for a worker, the most are %d and "
            "%g. Unless such a node is still to come, give other --threads, --gpus-per-worker or --device",
            threads, gpus, max((int(node.get("CPU", 0)) for node in nodes), default=0),
            max((node.get("GPU", 0) for node in nodes), default=0),
        )  # fmt: skip
    return threads


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Give SIGTERM and SIGINT back to the program: Ray takes them when it starts, and aborts on them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _connect(address: str | None, cpus: int) -> None:
    """Join the cluster at `address`, or start a private Ray on this machine. Raises InputError where none answers."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address is None:
        ray.init(address="local", num_cpus=max(cpus, usable_cores()), **settings)
        return
    del settings["include_dashboard"]
    try:
        _knock(address)
        ray.init(address=address, **settings)
    except Exception as error:  # Ray raises several types, some of them plain RuntimeError
        raise InputError(
            f"no Ray cluster can be joined at {address!r}",
            got=" ".join(str(error).split()),  # of versions that differ the first line says nothing
            expected="the address of a running cluster with the same Ray and Python versions",
            remedy="Check `ray status` on a node, or leave --ray-address out to use this machine alone.",
        ) from None


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at host:port, or something that is not Ray, which would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return
    with socket.create_connection((host, int(port)), timeout=10) as server:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        # Ray speaks gRPC, hence HTTP/2, where a frame of settings (type 4) comes first of all.
        server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        if server.recv(4)[3:] != b"\4":
            raise OSError("an answer that is not Ray's")
