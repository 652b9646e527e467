"""Labels shards in Ray actors. The only file that imports Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from labeler.base.cores import usable_cores
from labeler.base.errors import InputError, LabelingError, TokenLabelError
from labeler.base.freed_memory import keep_freed_memory
from labeler.base.signals import handlers_kept
from labeler.config import LabelerConfig
from labeler.executor import Advance
from labeler.worker import LabelingJob, ShardLabeler, ShardResult, ShardTask

log = logging.getLogger("labeler")

# Seconds without a reply after which a running actor counts as unreachable.
PATIENCE = 60.0


def refuse_absent_ray() -> None:
    """Raises ModuleNotFoundError if Ray is not installed; called before the teacher is built, which takes longer."""
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("workers need Ray. pip install 'token-labeling[label]'", name="ray")


def run_on_ray(tasks: list[ShardTask], job: LabelingJob, advance: Advance) -> Iterator[ShardResult]:
    """Labels shards with `config.workers` Ray actors, each with a teacher.

    Actors wait until the cluster has room for them, so workers come and go with the nodes. Errors that every worker
    would have (a wrong checkpoint, a full disk) end the run at once. A shard that fails, or that crashes its worker, is
    tried `config.max_attempts` times; all others are finished before LabelingError names it.

    Args:
        tasks: The shards.
        job: The run.
        advance: Called with the number of finished images.

    Yields:
        The result of each shard, as shards are finished.

    Raises:
        InputError: No Ray cluster answers.
        LabelingError: A shard could not be labeled.
    """
    import ray

    config = job.config
    # Ray shows each actor only its own GPUs, numbered from 0.
    device = "cuda" if job.device.startswith("cuda") else job.device
    elsewhere = replace(job, store=job.store.absolute(), device=device)
    ours = not ray.is_initialized()
    unfinished = {task.shard: task for task in tasks}
    while unfinished:
        if ours:
            with handlers_kept():  # Ray replaces them when it starts, and aborts on these signals
                _connect(config.ray_address, (config.threads or 1) * config.workers)
        gpus = config.gpus_per_worker if job.device.startswith("cuda") else 0
        threads = _threads([node["Resources"] for node in ray.nodes() if node["Alive"]], gpus, config)
        worker = ray.remote(num_cpus=threads, num_gpus=gpus)(_Worker)
        paths = [os.path.abspath(path) for path in sys.path]
        pool = _Pool(ray, partial(worker.remote, paths, elsewhere, threads), list(unfinished.values()), config, advance)
        try:
            for result in pool.results():
                del unfinished[result.shard]
                yield result
        except _UnheardError as error:
            if not ours:
                raise
            log.warning("%s; connecting to Ray again", error.problem)
        finally:
            pool.close()
            if ours:
                ray.shutdown()


class _UnheardError(LabelingError):
    """Ray runs an actor but did not report it to this process; it will not report any other actor either."""


class _Worker:
    """The actor. It loads the teacher in a call of its own, whose errors reach the driver unchanged."""

    def __init__(self, paths: list[str], job: LabelingJob, threads: int) -> None:
        # A teacher given as module:function may be where only the driver looks for modules.
        sys.path += [path for path in paths if path not in sys.path and os.path.isdir(path)]
        self.job, self.threads = job, threads
        self.labeler: ShardLabeler | None = None

    def greet(self) -> None:
        """Returns at once; the reply shows that actor and driver can reach each other."""

    def prepare(self) -> None:
        """Loads the teacher."""
        if self.job.device == "cpu":
            keep_freed_memory()
        self.labeler = ShardLabeler(self.job, self.threads)

    def label(self, task: ShardTask) -> ShardResult:
        """Labels one shard."""
        assert self.labeler is not None, "prepare comes first"
        return self.labeler(task)


class _Pool:
    """Gives shards to actors, replaces crashed actors, and counts the attempts of each shard.

    Ray's own restarts and retries are off: Ray would endlessly restart an actor that the kernel kills for its memory.
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
        # A running call -> its actor and its shard, or None for an actor that loads its teacher.
        self.running: dict[Any, tuple[Any, ShardTask | None]] = {}
        # A greeting without a reply -> its actor, and whether the actor was running at the last check.
        self.greetings: dict[Any, tuple[Any, bool]] = {}
        self.checked = time.monotonic()
        for _ in range(min(config.workers, len(tasks))):
            self._start_actor()

    def results(self) -> Iterator[ShardResult]:
        """Yields the result of each shard. Raises LabelingError at the end if some could not be labeled."""
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
        """Waits for a call to finish, and returns it."""
        while True:
            try:
                # Ray can handle signals between waits only, so none is long.
                finished, _ = self.ray.wait(list(self.running), num_returns=1, timeout=1)
            except SystemError as error:
                # Ray wraps what a signal handler raises during a wait.
                raise error.__cause__ or error from None
            if finished:
                return finished[0]
            if time.monotonic() > self.checked + PATIENCE / 2:
                self._check_greetings()

    def _check_greetings(self) -> None:
        """Raises _UnheardError if an actor has been running since the last check without replying to its greeting."""
        for greeting, (actor, was_running) in list(self.greetings.items()):
            running = _runs(actor)
            if self.ray.wait([greeting], timeout=0)[0]:
                del self.greetings[greeting]
            elif running and was_running:
                raise _UnheardError(
                    "Ray does not report its workers to this process",
                    got=f"no reply from a worker that has been running for {PATIENCE / 2:g} seconds or more",
                    remedy="All finished shards are committed; the same command resumes.",
                )
            else:
                self.greetings[greeting] = (actor, running)
        self.checked = time.monotonic()

    def close(self) -> None:
        """Ends all actors."""
        for actor in [*self.idle, *(actor for actor, _ in self.running.values())]:
            # The connection to Ray may be lost.
            with contextlib.suppress(Exception):
                self.ray.kill(actor)

    def _start_actor(self) -> None:
        """Starts an actor, which loads its teacher."""
        actor = self.start()
        self.greetings[actor.greet.remote()] = (actor, False)
        self.running[actor.prepare.remote()] = (actor, None)

    def _finish(self, call: Any, actor: Any, task: ShardTask | None) -> ShardResult | None:
        """Handles a finished call; returns the result of a labeled shard."""
        try:
            result = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            if task is None or isinstance(cause, TokenLabelError):
                raise cause from None
            # After a GPU error a process fails at everything, and fast: it would use up the attempts of every shard.
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
        """Queues a failed shard again, or gives it up."""
        self.attempts[task.shard] += 1
        tried, allowed = self.attempts[task.shard], self.config.max_attempts
        log.warning("shard %d failed, attempt %d of %d: %s", task.shard, tried, allowed, reason)
        if tried < allowed:
            self.waiting.append(task)
        else:
            self.given_up[task.shard] = (task, reason)
            self.unfinished -= 1

    def _count_failed_start(self, reason: str) -> None:
        """Raises LabelingError after too many crashes without a result."""
        self.failed_starts += 1
        if self.failed_starts >= self.config.max_attempts * self.config.workers:
            raise LabelingError(
                "the workers crash while they load the teacher",
                got=f"{self.failed_starts} crashes, the last: {reason}",
                remedy="Try one worker, more memory, or a smaller teacher.",
            )

    def _failure(self) -> LabelingError:
        """Returns the error for shards that could not be labeled."""
        shard = min(self.given_up)
        task, reason = self.given_up[shard]
        return LabelingError(
            f"{len(self.given_up)} shard(s) could not be labeled, "
            f"first shard {shard} (images {task.keys[0]!r} to {task.keys[-1]!r})",
            got=f"{self.config.max_attempts} failures, the last: {reason}",
            remedy="All other shards are committed. Look for one that crashes the teacher or needs too much memory.",
        )


def _runs(actor: Any) -> bool:
    """Asks Ray's head whether the actor is running; everything else waits for its messages."""
    # Ray's public interface for this needs its dashboard. Without an answer the run keeps waiting.
    with contextlib.suppress(Exception):
        from ray._private import state

        return bool(state.actors(actor._actor_id.hex())["State"] == "ALIVE")
    return False


def _threads(nodes: list[dict[str, float]], gpus: float, config: LabelerConfig) -> int:
    """Returns the CPUs of each worker: as set, or the most for which all workers fit. Warns if none fits."""
    usable = [(int(node.get("CPU", 0)), node.get("GPU", 0)) for node in nodes if node.get("GPU", 0) >= gpus]
    most = max((cpus for cpus, _ in usable), default=0)

    def room(threads: int) -> int:
        return sum(cpus // threads if not gpus else int(min(cpus // threads, gpu // gpus)) for cpus, gpu in usable)

    workers = min(config.workers, room(1))
    threads = config.threads or next((count for count in range(most, 0, -1) if room(count) >= workers), 1)
    if threads > most:
        log.warning(
            "waiting: no node of the Ray cluster has the %d CPU(s) and %g GPU(s) that a worker needs; the most are %d "
            "and %g. Unless such a node will join, change `threads`, `gpus_per_worker` or `device`",
            threads, gpus, max((int(node.get("CPU", 0)) for node in nodes), default=0),
            max((node.get("GPU", 0) for node in nodes), default=0),
        )  # fmt: skip
    return threads


def _connect(address: str | None, cpus: int) -> None:
    """Joins the cluster at `address`; None: starts Ray on this machine. Raises InputError if no cluster answers."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address is None:
        ray.init(address="local", num_cpus=max(cpus, usable_cores()), **settings)
        return
    del settings["include_dashboard"]
    try:
        _probe(address)
        ray.init(address=address, **settings)
    except Exception as error:  # Ray raises several types, some of them plain RuntimeError
        raise InputError(
            f"no Ray cluster can be joined at {address!r}",
            got=" ".join(str(error).split()),  # if versions differ, the first line says nothing
            expected="the address of a running cluster with the same Ray and Python versions",
            remedy="Check `ray status` on a node, or omit `ray_address` to use this machine only.",
        ) from None


def _probe(address: str) -> None:
    """Raises OSError if nothing, or something other than Ray, listens at host:port; Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return
    with socket.create_connection((host, int(port)), timeout=10) as server:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        # Ray uses gRPC, hence HTTP/2, where a settings frame (type 4) comes first.
        server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        if server.recv(4)[3:] != b"\4":
            raise OSError("an answer that is not Ray's")
