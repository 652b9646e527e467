"""How the label store and the rival's one file per image grow with their rows: time, bytes on disk, memory.

Each job runs in a separate process, so that memory is that of one job and every opening is the first one. Rows repeat
1,000 distinct synthetic maps, which helps neither side, since both store every image separately.

All files are in the page cache: the figures show the cost of the software, not of the disk.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from labeler.store.foreign_store import remember_written
from labeler.store.label_store import LabelStore
from labeler.store.plan import Plan
from labeler.store.shard_writer import begin_store, finish_store
from scripts.benchmark.inputs.synthetic_maps import (
    BATCH,
    Setting,
    encode,
    join,
    key_of,
    make_plan,
    rival_reader,
    rival_tensor,
    synthetic_logits,
    write_synthetic_shard,
)
from scripts.benchmark.measure import Case, Growth, Options, Result, in_own_process, resident, take_turns
from scripts.benchmark.studies.store_truth import FILES, LOAD, MIDDLE, random_rows

DISTINCT = 1000  # maps, and files in a folder of the rival's
BLOCK = 4096  # bytes: unit of disk space
ROWS = 256  # read at once
MOST_HELD = 0.5  # share of this machine's memory that cache="ram" may take
STORE, ONE_EACH, LIST = "store", "one .pt per image", "one .pt per image, files listed"
BUILD, OPEN, FIRST = "building, rows already encoded", "opening", f"first {ROWS} random rows after opening"
DISK, WARM, VERIFY = "bytes on disk per row", f"random rows, batches of {ROWS}, warm", "verify"
UNITS = {BUILD: "rows/s", DISK: "bytes/row", OPEN: "ms", FIRST: "ms", WARM: "µs/row", VERIFY: "rows/s"}
NOTES = {
    BUILD: "the store compresses and waits for the disk at each shard; the files are copies and wait for nothing; "
    "the workers' imports count, which shows below 100,000 rows",
    DISK: f"all files, in blocks of {BLOCK:,} bytes",
    OPEN: "in a new process; sought: the store under 2,000 ms with 1,000,000 rows",
    FIRST: "in a new process; the store compares the whole of each shard with its digest when it first touches it",
    WARM: "rows of the store are checked and decoded to float32, files are tensors as they lie",
    VERIFY: "every bit of every row, one process",
}
MEMORY = "of the whole process, Python included; no figure where the rows would fill half of the machine's memory"
Figures = dict[str, dict[str, list[float]]]  # figure -> side -> a value per round


def run(options: Options) -> Result:
    most = 10**4 if options.quick else options.rows
    sizes = [rows for rows in (10**3, 10**4, 10**5, 10**6) if rows <= most]
    material, found = options.scratch / "material", {}
    material.mkdir()
    job("prepare", material)
    for rows in sizes:
        print(f"store: {rows:,} rows, building, reading and verifying", file=sys.stderr)
        folder = options.scratch / f"rows-{rows}"
        folder.mkdir()
        found[rows] = measure(folder, material, rows, options)
        shutil.rmtree(folder)
    shutil.rmtree(material)
    return Result(cases(sizes[-1], found[sizes[-1]]), growths(found))


def job(name: str, *arguments: Any) -> Any:
    """Calls a function of this module in a separate process."""
    return in_own_process(f"scripts.benchmark.studies.store_growth:{name}", *arguments)


def measure(folder: Path, material: Path, rows: int, options: Options) -> tuple[Figures, dict[str, float]]:
    """Returns the figures of one size, and the resident MB after each step."""
    store, files, rounds = folder / "store", folder / "files", options.rounds(5)
    figures: Figures = {
        BUILD: {
            STORE: [job("build_store", store, material, rows, options.cores)],
            ONE_EACH: [job("write_files", files, material, rows, options.cores)],
        },
        DISK: {STORE: [job("disk_bytes", store) / rows], ONE_EACH: [job("disk_bytes", files) / rows]},
        OPEN: take_turns({STORE: partial(job, "open_store", store), LIST: partial(job, "list_files", files)}, rounds),
        FIRST: take_turns(
            {FILES: partial(job, "first_rows", store), LOAD: partial(job, "first_files", files, rows)}, rounds
        ),
        WARM: job("warm_rows", store, files, rows, rounds),
        VERIFY: {STORE: [job("verify", store)]},
    }
    return figures, memory(store)


def memory(store: Path) -> dict[str, float]:
    """Returns step -> resident MB, from four processes."""
    found = job("memory_of_rows", store, [ROWS, 10 * ROWS, 100 * ROWS])
    found[f"after {ROWS} rows of one shard"] = job("memory_of_one_shard", store)
    for kept in ("ram-compressed", "ram"):
        held = job("memory_of_cache", store, kept)
        if held is not None:
            found[f'all rows held, cache="{kept}"'] = held
    return found


def cases(rows: int, found: tuple[Figures, dict[str, float]]) -> list[Case]:
    figures, steps = found
    measured = [
        Case(f"{name}, {rows:,} rows", UNITS[name], values, UNITS[name] == "rows/s", note=NOTES[name])
        for name, values in figures.items()
    ]
    held = [
        Case(f"resident memory {step}, {rows:,} rows", "MB", {STORE: [value]}, note=MEMORY)
        for step, value in steps.items()
    ]
    return measured + held


def growths(found: dict[int, tuple[Figures, dict[str, float]]]) -> list[Growth]:
    last, _ = found[max(found)]
    measured = [
        Growth(
            name, "rows", UNITS[name],
            {side: [(rows, float(np.median(f[name][side]))) for rows, (f, _) in found.items()] for side in sides},
            note=NOTES[name],
        )
        for name, sides in last.items()
    ]  # fmt: skip
    every = dict.fromkeys(step for _, kept in found.values() for step in kept)
    points = {step: [(float(rows), kept[step]) for rows, (_, kept) in found.items() if step in kept] for step in every}
    return [*measured, Growth("resident memory", "rows", "MB", points, note=MEMORY)]


# The jobs get their arguments as JSON, so paths are strings.


def prepare(material: str) -> None:
    """Writes the distinct maps, encoded and as the rival's tensors."""
    import torch

    generator, parts = torch.Generator().manual_seed(0), []
    for start in range(0, DISTINCT, BATCH):
        logits = synthetic_logits(BATCH, generator, MIDDLE)
        parts.append(encode(logits, Setting()))
        for i, one in enumerate(logits):
            torch.save(rival_tensor(one), f"{material}/{start + i}.pt")
    np.savez(f"{material}/maps.npz", **vars(join(parts)))


def build_store(store: str, material: str, rows: int, processes: int) -> float:
    """Returns rows per second."""
    from labeler.make_plan import default_shard_size  # which loads torch

    plan = begin_store(Path(store), make_plan(Setting(), rows, default_shard_size(rows)))
    seconds = in_parallel(partial(build_shard, store, plan, material), range(plan.meta.shards), processes)
    started = time.perf_counter()
    finish_store(Path(store))
    seconds += time.perf_counter() - started
    remember_written(Path(store))
    return rows / seconds


def build_shard(store: str, plan: Plan, material: str, shard: int) -> None:
    write_synthetic_shard(Path(store), plan, shard, distinct_maps(material))


@cache
def distinct_maps(material: str) -> Any:
    """Returns the fields of `EncodedMaps`, without importing its module, since that loads torch."""
    return SimpleNamespace(**np.load(f"{material}/maps.npz"))


def write_files(files: str, material: str, rows: int, processes: int) -> float:
    """Returns files per second."""
    folders = range(-(-rows // DISTINCT))
    return rows / in_parallel(partial(write_folder, files, material, rows), folders, processes)


def write_folder(files: str, material: str, rows: int, folder: int) -> None:
    part = range(folder * DISTINCT, min((folder + 1) * DISTINCT, rows))
    rival_path(files, part[0]).parent.mkdir(parents=True)
    for row, data in zip(part, distinct_files(material), strict=False):
        rival_path(files, row).write_bytes(data)


@cache
def distinct_files(material: str) -> list[bytes]:
    return [Path(material, f"{i}.pt").read_bytes() for i in range(DISTINCT)]


def rival_path(files: str, row: int) -> Path:
    return Path(files, key_of(row)).with_suffix(".pt")


def in_parallel(task: Callable[[int], None], items: Sequence[int], processes: int) -> float:
    """Returns the seconds of all tasks, without the start of the processes."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(time.sleep, [1.0] * processes))
        started = time.perf_counter()
        list(pool.map(task, items))
        return time.perf_counter() - started


def disk_bytes(folder: str) -> int:
    sizes = (os.stat(os.path.join(at, name)).st_size for at, _, names in os.walk(folder) for name in names)
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


def open_store(store: str) -> float:
    """Returns milliseconds."""
    started = time.perf_counter()
    len(LabelStore(store))
    return (time.perf_counter() - started) * 1e3


def list_files(files: str) -> float:
    """Returns milliseconds."""
    started = time.perf_counter()
    sum(len(names) for _, _, names in os.walk(files))
    return (time.perf_counter() - started) * 1e3


def first_rows(store: str) -> float:
    """Returns milliseconds."""
    labels = LabelStore(store)
    return random_rows(labels.read, len(labels), ROWS, ROWS)() * ROWS / 1e3


def first_files(files: str, rows: int) -> float:
    """Returns milliseconds."""
    return random_rows(rival_reader(partial(rival_path, files)), rows, ROWS, ROWS)() * ROWS / 1e3


def warm_rows(store: str, files: str, rows: int, rounds: int) -> dict[str, list[float]]:
    """Returns side -> µs per row."""
    ways = {FILES: LabelStore(store).read, LOAD: rival_reader(partial(rival_path, files))}
    return take_turns({name: random_rows(read, rows, 10 * ROWS, ROWS) for name, read in ways.items()}, rounds)


def verify(store: str) -> float:
    """Returns rows per second."""
    from labeler.checks.verify import verify_store

    started = time.perf_counter()
    found = verify_store(store)
    if found.problems:
        raise RuntimeError(found.text())
    return found.rows / (time.perf_counter() - started)


def memory_of_rows(store: str, counts: list[int]) -> dict[str, float]:
    """Returns step -> resident MB, in the order of the steps."""
    found = {"after import": resident() / 1e6}
    labels = LabelStore(store)
    found["after opening"] = resident() / 1e6
    for count in counts:
        random_rows(labels.read, len(labels), count, ROWS)()
        found[f"after {count:,} random rows"] = resident() / 1e6
    return found


def memory_of_one_shard(store: str) -> float:
    labels = LabelStore(store)
    random_rows(labels.read, labels.markers[0].rows, ROWS, ROWS)()
    return resident() / 1e6


def memory_of_cache(store: str, kept: str) -> float | None:
    """Returns resident MB; None if the rows would take too much of the machine's memory."""
    labels = LabelStore(store, cache=kept)
    row = sum(dtype.itemsize * math.prod(shape) for dtype, shape in labels.plan.layout.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if kept == "ram" and len(labels) * row > MOST_HELD * memory:
        return None
    labels.read(np.arange(0, len(labels), labels.plan.shard_size))  # one row of every shard
    return resident() / 1e6
