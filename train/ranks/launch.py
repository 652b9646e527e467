"""Several ranks on one machine: start them together, stop them together, and print one line with the reason."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from labeler.base.errors import InputError
from labeler.base.signals import STOPPED

GRACE_S = 15.0  # after one rank has failed, time for the others to notice, save or give up
POLL_S = 0.1
ROOT = Path(__file__).parents[2]  # of our packages: the working folder may have others with the same names


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Run `python -m train` with these arguments once for each rank.

    Only the first rank's output is shown, and the last line of another rank if that fails first. SIGTERM is passed on
    to all of them; Ctrl-C reaches them from the terminal.

    Args:
        arguments: of the command line, including `--ranks`.
        ranks: how many to start.

    Returns:
        The exit status of the rank that failed first; 0: none failed.

    Raises:
        InputError: another launcher has started this process.
    """
    if "RANK" in os.environ:
        raise InputError("--ranks starts the ranks itself", got="RANK is set", remedy="Omit torchrun or --ranks.")
    with ExitStack() as stack:
        errors = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, ranks))]
        port = str(free_port())
        processes = [_start(arguments, rank, ranks, port, errors[rank]) for rank in range(ranks)]
        stack.callback(_stop, processes)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, _: _send(processes, number))
        ended = _wait(processes)
        rank = _cause(ended)
        if rank is None:
            return 0
        status = ended[rank]
        if status < 0:
            print(f"error: rank {rank} was ended by {signal.Signals(-status).name}", file=sys.stderr)
            return 1
        if rank and (line := _last_line(errors[rank])):
            print(f"error: rank {rank}: {line.removeprefix('error: ')}", file=sys.stderr)
        return status


def _start(
    arguments: Sequence[str], rank: int, ranks: int, port: str, errors: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    variables: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[1:]])
    command = [sys.executable, "-P", "-m", "train", *_without_ranks(arguments)]
    return subprocess.Popen(command, env=environment, stderr=errors, stdout=None if rank == 0 else subprocess.DEVNULL)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait for all. Returns rank -> exit status in the order they ended. After a failure the others are killed."""
    ended: dict[int, int] = {}
    until = float("inf")
    while len(ended) < len(processes):
        time.sleep(POLL_S)
        for rank, process in enumerate(processes):
            if rank not in ended and (status := process.poll()) is not None:
                ended[rank] = status
                until = min(until, time.monotonic() + GRACE_S) if status else until
        if time.monotonic() > until:
            _stop(processes)
            break
    return ended


def _cause(ended: dict[int, int]) -> int | None:
    """The rank that failed first. Status 1 counts less: that rank may only have noticed that another was gone.

    Where a signal stopped all ranks, it is the first one, which has printed so; it may be the last to end.
    """

    def order(rank: int) -> tuple[bool, bool, bool]:
        return ended[rank] > 0, ended[rank] == 1, ended[rank] == STOPPED and rank > 0

    return min((rank for rank, status in ended.items() if status), key=order, default=None)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(number)


def _without_ranks(arguments: Sequence[str]) -> list[str]:
    """The arguments of each rank: the same without `--ranks`."""
    kept, skip_next = [], False
    for argument in arguments:
        if skip_next or argument.startswith("--ranks="):
            skip_next = False
        elif argument == "--ranks":
            skip_next = True
        else:
            kept.append(argument)
    return kept


def _last_line(errors: IO[bytes] | None) -> str:
    if errors is None:
        return ""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def free_port() -> int:
    """Returns a port that nobody has, and that the system does not give to the next process that asks for any."""
    # Linux hands out 32768 to 60999, Ray 10002 to 19999: between the choice and the first rank's start lie seconds.
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise InputError("no port is free", got="100 of 20000 to 32767 are in use", remedy="Start ranks with torchrun.")
