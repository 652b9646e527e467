"""Trains what a table lists: every run a recipe and a seed, one thread each, several at once, resumable."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import train.__main__
from labeler.base.signals import STOPPED, StopSignals
from labeler.base.whole_files import replace_file
from scripts.cifar10 import command
from scripts.evidence.data import Pictures
from scripts.evidence.swapped import swapped_crops
from scripts.evidence.tables import Choice, Labels, Table
from train.network import build_network, set_classes
from train.recipes.config import TrainConfig
from train.recipes.recipe import load_recipe
from train.record.continuation import differences

RESULT = "result.json"
CLASSES = 10


@dataclass(frozen=True)
class Run:
    """One training: a row of a table, taught in one way, with one seed.

    Attributes:
        table: its table.
        row: its row.
        arm: its arm.
        seed: its seed.
        out: folder of all runs.
    """

    table: Table
    row: Choice
    arm: Choice
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        """The run's own folder. Runs of several tables that are the same in all things have the same."""
        chosen = dict(text.split("=", 1) for text in self.overrides())
        labels = self.table.labels_of(self.row, self.arm)
        what = [self.table.recipe, self.table.pictures, sorted(chosen.items()), asdict(labels), self.row.swapped]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
        return self.out / f"{self.table.pictures}-{digest}-{self.seed}"

    def overrides(self) -> list[str]:
        """What it changes in the recipe, places and seed aside; of one key the last counts."""
        return [*self.table.overrides, *self.row.overrides, *self.arm.overrides]

    def settings(self, pictures: Pictures) -> list[str]:
        """The overrides of the table's recipe."""
        places = [
            f"data.images={pictures.train}",
            f"data.validation={pictures.test}",
            f"data.image_list={pictures.listed}",
            f"data.store={pictures.stores / self.table.labels_of(self.row, self.arm).name}",
            f"run.out={self.folder}",
            f"run.seed={self.seed}",
        ]
        return [*places, *self.overrides(), "run.threads=1", "data.threads=1", "run.progress=false"]

    def result(self, pictures: Pictures) -> dict[str, Any] | None:
        """What an earlier call found; None: there was none with these settings."""
        found, recipe = self.folder / RESULT, self.folder / "config.toml"
        if not found.exists() or differences(
            load_recipe(recipe), load_recipe(self.table.recipe, self.settings(pictures))
        ):
            return None
        return {**json.loads(found.read_text()), "row": self.row.name, "arm": self.arm.name}


def stores_of(runs: Sequence[Run]) -> list[Labels]:
    """The stores that runs train from, each once."""
    labels = {run.table.labels_of(run.row, run.arm): None for run in runs if "data.store=none" not in run.overrides()}
    return list(labels)


def plan(
    table: Table, arms: Sequence[str] | None, seeds: Sequence[int], out: Path, rows: Sequence[str] | None = None
) -> list[Run]:
    """All runs of a table, one seed after another, so that there is a table at any time; None: all arms, all rows."""
    return [
        Run(table, row, arm, seed, out / "students")
        for seed in seeds
        for row in table.rows
        for arm in table.arms
        if (rows is None or row.name in rows) and (arms is None or arm.name in arms)
    ]


def train_all(runs: Sequence[Run], pictures: Pictures, jobs: int, minutes: float) -> Iterator[dict[str, Any]]:
    """Train, and yield each run's result when it is there.

    Args:
        runs: what to train; those with a result are not trained again.
        pictures: images and labels.
        jobs: how many train at once.
        minutes: after this time no further one begins.

    Yields:
        The results, in the order in which they come.
    """
    waiting, started = [], time.monotonic()
    for run in runs:
        if (found := run.result(pictures)) is not None:
            yield found
        else:
            waiting.append(run)
    context = multiprocessing.get_context("spawn")
    busy: set[Future[dict[str, Any]]] = set()
    with StopSignals() as stop, ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=8) as pool:
        while (waiting or busy) and not stop.requested:
            late = time.monotonic() - started > 60 * minutes
            while waiting and len(busy) < jobs and not late:
                busy.add(pool.submit(train_one, waiting.pop(0), pictures))
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


def train_one(run: Run, pictures: Pictures) -> dict[str, Any]:
    """Train one model as a user would. Returns its result, which it also writes to the run's folder."""
    settings, started = run.settings(pictures), time.process_time()
    with swapped_crops() if run.row.swapped else nullcontext():
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
