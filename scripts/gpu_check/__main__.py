"""Checks this project on a machine with a GPU, then measures it: one command for a machine that is there for an hour.

    python -m scripts.gpu_check                              # everything, the most important first: about 25 minutes
    python -m scripts.gpu_check --minutes 10 --out found     # what fits into ten minutes
    python -m scripts.gpu_check scan step rates              # only these parts
    python -m scripts.gpu_check --device cpu --quick         # a rehearsal without a GPU: under a minute

Needs torch 2.11, Triton 3.6, timm, h5py and this project, installed or as the working folder; parts that need Ray or
DALI say so where they are missing. First correctness: of each kernel against float64, of a training step, labels,
loader and resuming against the CPU. Then speed. Every part runs in a process of its own with a time limit, so that one
that crashes or hangs costs only itself. Each result is a JSON line of gpu_check.jsonl in `--out`, written at once; the
last line is the summary. Exit status: 0 every part that ran is right, 1 one is not, 2 bad usage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GRACE_S = 20.0  # less time than this is not worth starting a part
PRELOADED = ["torch", "timm", "model", "pipeline", "train.task"]


@dataclass(frozen=True)
class Part:
    """A part: "module:function", its time limit on a GPU in seconds, and whether a rehearsal leaves it out."""

    function: str
    seconds: int
    only_full: bool = False


COMPUTE, DATA, RATES = (f"scripts.gpu_check.{name}" for name in ("compute_checks", "data_checks", "rates"))
PARTS = {
    "card": Part(f"{RATES}:card", 60),
    "scan": Part(f"{COMPUTE}:scan", 180),
    "mixer": Part(f"{COMPUTE}:mixer", 120),
    "loss": Part(f"{COMPUTE}:loss", 120),
    "step": Part(f"{COMPUTE}:step", 180),
    "rates": Part(f"{RATES}:rates", 300),
    "labels": Part(f"{DATA}:labels", 120),
    "loader": Part(f"{DATA}:loader", 120),
    "resume": Part(f"{DATA}:resume", 120),
    "compiled": Part(f"{RATES}:compiled", 300, only_full=True),
    "segments": Part(f"{RATES}:segments", 120, only_full=True),
    **{f"benchmark-{suite}": Part(f"{RATES}:benchmark_{suite}", 600, only_full=True)
       for suite in ("train", "scan", "model", "loader", "loss", "labeler", "targets")},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    lines = str(__doc__).splitlines()
    parser = argparse.ArgumentParser(
        "scripts.gpu_check", description=lines[0], epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, and no part that takes minutes")
    parser.add_argument("--minutes", type=float, default=60.0, help="time for everything (%(default)g)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the results (default: the working folder)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no such part: got {unknown[0]!r}, expected any of {', '.join(PARTS)}")
    if not options.minutes > 0:
        parser.error(f"--minutes: got {options.minutes:g}, expected more than 0")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "gpu_check.jsonl").open("a") as file:
            return run(options, Log(file))
    except OSError as error:
        parser.error(f"--out: {error.filename!r} cannot be written: {error.strerror}")


class Log:
    """Writes each record as a line at once, and prints it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def add(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, default=str)
        self._file.write(line + "\n")
        self._file.flush()
        print(line, flush=True)


def run(options: argparse.Namespace, log: Log) -> int:
    """Runs the parts one after the other, and returns the exit status."""
    until, outcomes = time.monotonic() + 60 * options.minutes, dict[str, str]()
    chosen = options.parts or [name for name, part in PARTS.items() if not (options.quick and part.only_full)]
    # CUDA does not survive a fork, so the rehearsal alone saves the time of importing everything for each part.
    context: Any = multiprocessing.get_context("forkserver" if options.quick and options.device == "cpu" else "spawn")
    context.set_forkserver_preload(PRELOADED)
    for name in chosen:
        left = until - time.monotonic()
        if left < GRACE_S:
            outcomes[name] = "no time left"
            continue
        began = time.monotonic()
        outcomes[name] = run_part(context, name, min(PARTS[name].seconds, left), options, log)
        log.add({"part": name, "outcome": outcomes[name], "seconds": round(time.monotonic() - began, 1)})
    wrong = [name for name, outcome in outcomes.items() if outcome not in ("right", "no time left")]
    log.add({"summary": outcomes, "device": options.device, "quick": options.quick, "wrong": wrong})
    return 1 if wrong else 0


def run_part(context: Any, name: str, seconds: float, options: argparse.Namespace, log: Log) -> str:
    """Runs a part in a process of its own. Returns "right", or what was not."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, PARTS[name].function, options.device, options.quick))
    process.start()
    sender.close()
    until, wrong, last = time.monotonic() + seconds, list[str](), None
    with suppress(EOFError):
        while receiver.poll(max(0.0, until - time.monotonic())):
            last = receiver.recv()
            log.add({"part": name, **last})
            wrong += [last["check"]] if last.get("ok") is False else []
    process.join(max(0.0, min(5.0, until - time.monotonic())))
    if process.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return f"stopped after {seconds:.0f} s"
    if process.exitcode:
        return "error" if last and "error" in last else f"ended with {process.exitcode}"
    return f"wrong: {', '.join(wrong)}" if wrong else "right"


def work(sender: Connection, function: str, device: str, quick: bool) -> None:
    """Runs a part, in its process, and sends what it says."""
    os.setsid()  # so that whatever it starts can be ended with it
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(Says(sender), device, quick)
    except Exception as error:
        traceback.print_exc(limit=12)
        sender.send({"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"})
        sys.exit(1)


class Says:
    """What a part has found, sent to the process that writes it down."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def __call__(self, **figures: Any) -> None:
        self._sender.send(figures)

    def check(self, name: str, found: float, limit: float, **more: Any) -> None:
        """Says whether a figure, such as an error, is within its limit; a NaN is not."""
        self._sender.send({"check": name, "found": found, "limit": limit, "ok": bool(found <= limit), **more})


if __name__ == "__main__":
    sys.exit(main())
