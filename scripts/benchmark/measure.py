"""Measuring in turns: every side of a comparison is measured once in each round.

A side is a function that does its work once and returns one figure. `take_turns` runs every side once to warm up, then
alternates between them, so that other load on the machine affects all of them equally; ratios are taken within a round.
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
SLACK = 1 << 20  # bytes beyond the largest resident set, so that growth shows from its first byte
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
        """Number of calls in a row of something short: on a GPU one ends before Python has started the next."""
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
        """Returns the lowest, median and highest ratio by which ours was better than the rival in the same round."""
        pairs = zip(self.values[self.ours], self.values[rival], strict=True)
        return spread([ours / other if self.more_is_better else other / ours for ours, other in pairs])


@dataclass(frozen=True)
class Growth:
    """How a figure grows with x; `points`: side -> [(x, value)]; `logarithmic`: both axes are."""

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
    """The result of a suite; `left_out`: name of a case -> why it could not be measured on this machine."""

    cases: list[Case] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    curves: list[Curves] = field(default_factory=list)


def note_of(*parts: str) -> str:
    """Joins the parts that are not empty to a note."""
    return "; ".join(part for part in parts if part)


def take_turns(sides: Mapping[str, Callable[[], float]], rounds: int, warmups: int = 1) -> dict[str, list[float]]:
    """Measures all sides in turns. Returns each side's figures, one per round."""
    for _ in range(warmups):
        for side in sides.values():
            side()
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            figures[name].append(side())
    return figures


def milliseconds(call: Callable[[], Any], device: str = "cpu", times: int = 1) -> Callable[[], float]:
    """Returns a side that measures milliseconds per call, of `times` calls in a row."""

    def side() -> float:
        started = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(device)
        return (time.perf_counter() - started) / times * 1e3

    return side


def per_second(images: int, side: Callable[[], float]) -> Callable[[], float]:
    """Turns a side in milliseconds for `images` images into one in images per second."""
    return lambda: images / side() * 1e3


def free_gpu(device: str) -> None:
    """Releases torch's cached memory for the processes that start next."""
    if device == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def spread(values: list[float]) -> list[float]:
    """Returns the lowest, median and highest value."""
    return [min(values), statistics.median(values), max(values)]


def in_own_process(function: str, *arguments: Any, **named: Any) -> Any:
    """Calls "package.module:function" with plain values in a new interpreter and returns its result."""
    command = [sys.executable, "-m", "scripts.benchmark.measure", function, json.dumps([arguments, named], default=str)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait()  # it got the signal, too, and cleans up
            raise
    if process.returncode:
        kind = printed.splitlines()[-1:] if process.returncode == 1 else []  # the kind of its error, as printed below
        raise RuntimeError(": ".join([f"{function} ended with {process.returncode}", *kind]))
    return json.loads(printed.splitlines()[-1])


def alone_on_cpu(device: str, function: str, *arguments: Any) -> Any:
    """Calls a function in a separate process on a CPU, as `extra_memory` needs it; on a GPU in this process."""
    if device == "cpu":
        return in_own_process(function, *arguments)
    return named_function(function)(*arguments)


def named_function(name: str) -> Callable[..., Any]:
    """Returns the function that "package.module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def extra_memory(call: Callable[[], Any], device: str = "cpu") -> float:
    """Returns the MB that one call needs at its peak beyond what is held before it. CPU: only in a separate process.

    On the CPU it is the growth of the largest resident set. Call the function on something small first, to load code.
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
    # Memory that was freed since the largest resident set would hide that much of the call's growth: fill it.
    filler = bytearray(max(0, _largest_resident() - resident()) + SLACK)
    filler[:: resource.getpagesize()] = b"\1" * len(filler[:: resource.getpagesize()])
    before = _largest_resident()
    kept = call()
    grown = _largest_resident() - before
    del kept, filler
    return grown / 1e6


def _keep_nothing_freed() -> None:
    """Lets malloc return freed memory to the system at once; by default it keeps some megabytes."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, MMAPS_BY_DEFAULT)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)


def resident() -> int:
    """Returns the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _largest_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    positional, keywords = json.loads(sys.argv[2])
    try:
        print(json.dumps(named_function(sys.argv[1])(*positional, **keywords)))
    except (Exception, SystemExit) as error:
        print(type(error).__name__)  # published with the results; the error's text may contain a user's paths
        raise
