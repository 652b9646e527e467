"""Measuring in turns: each figure is measured beside its rivals' in the same run, round by round.

A side is a function that does its work once and returns one figure. `take_turns` warms every side up, then lets them
alternate, so that whatever else the machine does hits all of them alike; ratios are formed within a round.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labeler.base.freed_memory import M_MMAP_MAX, MMAPS_BY_DEFAULT

M_MMAP_THRESHOLD = -3  # of glibc's mallopt
SLACK = 1 << 20  # bytes on top of the largest resident set so far, so that growth shows from its first byte
# For the note of a case whose sides run within `freed_memory_kept`, by device: a GPU's memory is torch's own.
KEPT = {"cpu": "freed memory kept on all sides, as `fit` does", "cuda": ""}


@dataclass(frozen=True)
class Options:
    """Options of a suite.

    Attributes:
        device: "cpu" or "cuda".
        quick: fewer rounds and smaller sizes, for a quick look.
        images: folder of photographs, or of drawn images if none was given.
        scratch: folder for temporary files, removed afterwards.
        cores: CPU cores that this process may use.
        drawn: whether the images are drawn ones, which mean nothing to a real teacher.
        teacher: name of a real teacher, for the maps of `store`.
        checkpoint: its weights; None: those that belong to the name.
        rows: rows of the largest store whose growth `store` measures.
    """

    device: str
    quick: bool
    images: Path
    scratch: Path
    cores: int
    drawn: bool = True
    teacher: str = "scripts.efficientnet_lite:lite2"
    checkpoint: str | None = None
    rows: int = 1_000_000

    def rounds(self, full: int) -> int:
        return max(2, full // 3) if self.quick else full

    @property
    def calls(self) -> int:
        """Of something short in a row: a GPU is through with one before Python has started the next."""
        return 20 if self.device == "cuda" else 1


@dataclass(frozen=True)
class Case:
    """One figure of a suite with those of its rivals.

    Attributes:
        name: what is measured, with its sizes: "random rows, batches of 100".
        unit: unit of all values: "µs/row", "images/s", "ms", "MB".
        values: side -> one value per round; ours is the first side, and the sides take turns in each round.
        more_is_better: whether larger values are better.
        sought: rival -> how many times better ours should be.
        note: what a reader must know to interpret it.
    """

    name: str
    unit: str
    values: Mapping[str, list[float]]
    more_is_better: bool = False
    sought: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def ours(self) -> str:
        return next(iter(self.values))

    def advantage(self, rival: str) -> list[float]:
        """Lowest, median and highest ratio by which ours was better than the rival in the same round."""
        pairs = zip(self.values[self.ours], self.values[rival], strict=True)
        return spread([ours / other if self.more_is_better else other / ours for ours, other in pairs])


@dataclass(frozen=True)
class Growth:
    """The growth of a figure with x: `points`: side -> [(x, value)]; `logarithmic`: both axes."""

    name: str
    x: str
    unit: str
    points: Mapping[str, list[tuple[float, float]]]
    logarithmic: bool = True
    note: str = ""


@dataclass(frozen=True)
class Curves:
    """A plot of y against x; the figures are in the result's cases.

    Attributes:
        name: title of the plot.
        x: label of the x axis.
        y: label of the y axis.
        lines: side -> [(x, y)], drawn as lines.
        marks: side -> [(x, y)], drawn as points.
    """

    name: str
    x: str
    y: str
    lines: Mapping[str, list[tuple[float, float]]]
    marks: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The result of a suite; left_out: name of a case -> why it could not be measured here."""

    cases: list[Case] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    curves: list[Curves] = field(default_factory=list)


def note_of(*parts: str) -> str:
    """Join the parts that are not empty to a note."""
    return "; ".join(part for part in parts if part)


def take_turns(sides: Mapping[str, Callable[[], float]], rounds: int, warmups: int = 1) -> dict[str, list[float]]:
    """Measure all sides in turns. Returns each side's figures, one per round."""
    for _ in range(warmups):
        for side in sides.values():
            side()
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            figures[name].append(side())
    return figures


def milliseconds(call: Callable[[], Any], device: str = "cpu", times: int = 1) -> Callable[[], float]:
    """A side: milliseconds per call, of `times` calls in a row."""

    def side() -> float:
        started = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(device)
        return (time.perf_counter() - started) / times * 1e3

    return side


def per_second(images: int, side: Callable[[], float]) -> Callable[[], float]:
    """A side in images per second, from one in milliseconds for `images` of them."""
    return lambda: images / side() * 1e3


def free_gpu(device: str) -> None:
    """Release torch's cached memory for the processes that are started next."""
    if device == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def spread(values: list[float]) -> list[float]:
    """Lowest, median and highest."""
    return [min(values), statistics.median(values), max(values)]


def in_own_process(function: str, *arguments: Any, **named: Any) -> Any:
    """The result of "package.module:function", called with plain values in a fresh interpreter."""
    command = [sys.executable, "-m", "scripts.benchmark.measure", function, json.dumps([arguments, named], default=str)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait()  # it was interrupted, too, and tidies up
            raise
    if process.returncode:
        kind = printed.splitlines()[-1:] if process.returncode == 1 else []  # of its error, as printed below
        raise RuntimeError(": ".join([f"{function} ended with {process.returncode}", *kind]))
    return json.loads(printed.splitlines()[-1])


def alone_on_cpu(device: str, function: str, *arguments: Any) -> Any:
    """`in_own_process` on a CPU, where `extra_memory` asks for it; on a GPU in this process."""
    if device == "cpu":
        return in_own_process(function, *arguments)
    return named_function(function)(*arguments)


def named_function(name: str) -> Callable[..., Any]:
    """Of "package.module:function"."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def extra_memory(call: Callable[[], Any], device: str = "cpu") -> float:
    """MB that one call needs at its peak beyond what is held before it. CPU: only in a process of its own.

    On the CPU it is the growth of the largest resident set. Call once on something small before: code is loaded then.
    """
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    _keep_nothing_freed()
    # What was freed since the largest resident set so far would hide as much of the call's growth: fill it.
    filler = bytearray(max(0, _largest_resident() - resident()) + SLACK)
    filler[:: resource.getpagesize()] = b"\1" * len(filler[:: resource.getpagesize()])
    before = _largest_resident()
    kept = call()
    grown = _largest_resident() - before
    del kept, filler
    return grown / 1e6


def _keep_nothing_freed() -> None:
    """From now on return freed memory to the system at once; by default malloc keeps some megabytes."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, MMAPS_BY_DEFAULT)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _largest_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    positional, keywords = json.loads(sys.argv[2])
    try:
        print(json.dumps(named_function(sys.argv[1])(*positional, **keywords)))
    except (Exception, SystemExit) as error:
        print(type(error).__name__)  # goes into published results, where its text may name a user's folders
        raise
