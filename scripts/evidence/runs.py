"""Trains what a table lists: every run a recipe and a seed, one thread each, several at once, resumable."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import train.__main__
from labeler.base.signals import STOPPED, StopSignals
from labeler.base.whole_files import replace_file
from scripts.cifar10 import command
from scripts.evidence.data import Data
from scripts.evidence.tables import Choice, Table
from train.network import build_network, set_classes
from train.recipes.config import TrainConfig
from train.recipes.recipe import load_recipe
from train.record.continuation import differences

RESULT = "result.json"
CLASSES = 10


@dataclass(frozen=True)
class Run:
    """One training: a row of a table, taught in one way, with one seed; `folder` is its own."""

    table: Table
    row: Choice
    arm: Choice
    seed: int
    folder: Path

    def settings(self, data: Data) -> list[str]:
        """The overrides of the table's recipe."""
        places = [f"data.images={data.images / 'train'}", f"data.validation={data.images / 'test'}"]
        places += [
            f"data.image_list={data.listed}",
            f"data.store={data.store}",
            f"run.out={self.folder}",
            f"run.seed={self.seed}",
        ]
        own = [*self.table.overrides, *self.row.overrides, *self.arm.overrides]
        return [*places, *own, "run.threads=1", "data.threads=1", "run.progress=false"]

    def result(self, data: Data) -> dict[str, Any] | None:
        """What an earlier call found; None: there was none with these settings."""
        found, recipe = self.folder / RESULT, self.folder / "config.toml"
        if not found.exists() or differences(load_recipe(recipe), load_recipe(self.table.recipe, self.settings(data))):
            return None
        return json.loads(found.read_text())


def plan(table: Table, arms: Sequence[str], seeds: Sequence[int], out: Path) -> list[Run]:
    """All runs of a table, one seed after another, so that there is a table at any time."""
    return [
        Run(table, row, arm, seed, out / table.name / f"{row.name}-{arm.name}-{seed}")
        for seed in seeds
        for row in table.rows
        for arm in table.arms
        if arm.name in arms
    ]


def train_all(runs: Sequence[Run], data: Data, jobs: int, minutes: float) -> Iterator[dict[str, Any]]:
    """Train, and yield each run's result when it is there.

    Args:
        runs: what to train; those with a result are not trained again.
        data: images and labels.
        jobs: how many train at once.
        minutes: after this time no further one begins.

    Yields:
        The results, in the order in which they come.
    """
    waiting, started = [], time.monotonic()
    for run in runs:
        if (found := run.result(data)) is not None:
            yield found
        else:
            waiting.append(run)
    context = multiprocessing.get_context("spawn")
    busy: set[Future[dict[str, Any]]] = set()
    with StopSignals() as stop, ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=8) as pool:
        while (waiting or busy) and not stop.requested:
            late = time.monotonic() - started > 60 * minutes
            while waiting and len(busy) < jobs and not late:
                busy.add(pool.submit(train_one, waiting.pop(0), data))
            if not busy:
                print(f"time is up: {len(waiting)} runs are left", file=sys.stderr)
                return
            done, busy = wait(busy, timeout=1, return_when=FIRST_COMPLETED)
            for one in done:
                yield one.result()
        if stop.requested:
            for worker in multiprocessing.active_children():
                worker.terminate()  # a run in it saves its state and ends
            raise SystemExit(STOPPED)


def train_one(run: Run, data: Data) -> dict[str, Any]:
    """Train one model as a user would. Returns its result, which it also writes to the run's folder."""
    settings, started = run.settings(data), time.process_time()
    summary = command(train.__main__, ["fit", run.table.recipe, *settings, "--resume", "auto", "--json"])
    found = {
        "row": run.row.name,
        "arm": run.arm.name,
        "seed": run.seed,
        "top1": summary["top1"],
        "steps": summary["steps"],
        "parameters": parameters(load_recipe(run.table.recipe, settings)),
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    replace_file(run.folder / RESULT, json.dumps(found).encode() + b"\n")
    return found


def parameters(config: TrainConfig) -> int:
    """Parameters of a recipe's network with both heads for the data's classes."""
    with torch.random.fork_rng(devices=[]):
        net = build_network(config.model)
    set_classes(net, CLASSES, None, config.model)
    return sum(parameter.numel() for parameter in net.parameters())
