"""What a run tells of itself: `metrics.jsonl` and `.csv`, `speed.jsonl`, TensorBoard's events, and trackers.

`metrics.jsonl` holds only what the run computes, the same however often it was interrupted; how fast it went stands in
`speed.jsonl`.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file

log = logging.getLogger("train")

Row = dict[str, Any]


class Metrics:
    """Appends rows {"kind": "train" | "eval", "step": …, …}; goes on from `step`, so later rows of the file are cut."""

    def __init__(
        self, folder: Path, step: int, tensorboard: bool, tracker: Any = None, evaluates_again: bool = True
    ) -> None:
        """
        tracker          as `start_tracker` gives it
        evaluates_again  the run begins with the evaluation at `step`, which may not have been finished
        """
        self.folder, self._jsonl, self._behind = folder, folder / "metrics.jsonl", False
        self.rows = [
            row for row in read_rows(folder) if row["step"] < step + (row["kind"] == "train" or not evaluates_again)
        ]
        replace_file(self._jsonl, b"".join(map(_line, self.rows)))
        speed = [row for row in _read(folder / "speed.jsonl") if row["step"] <= step]
        replace_file(folder / "speed.jsonl", b"".join(map(_line, speed)))
        self._writer: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            # Names of files hold seconds; two runs of a moment are told apart by their steps.
            suffix = f".step-{step:08d}"
            first = 0 if not (folder / "tensorboard").exists() else step
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step, filename_suffix=suffix)
            # TensorBoard forgets the points at `purge_step`, too; a history from elsewhere it has never seen.
            told = [*self.rows, *({"kind": "speed", **row} for row in speed)]
            for row in (row for row in told if row["step"] >= first):
                self._draw(row)
        self._tracker = tracker

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._append(self._jsonl, row)
        self._report(row)

    def add_speed(self, row: Row) -> None:
        self._append(self.folder / "speed.jsonl", row)
        self._report({"kind": "speed", **row})

    def _append(self, path: Path, row: Row) -> None:
        """On a full disk the row waits for the next `sync`: no reason to stop training."""
        try:
            with open(path, "ab") as file:
                file.write(_line(row))
        except OSError as error:
            log.error("%s cannot be written: %s; training goes on", path, error.strerror)
            self._behind = True

    def _report(self, row: Row) -> None:
        if self._writer is not None:
            self._draw(row)
        if self._tracker is not None:
            self._tracker.log({**_scalars(row), "step": row["step"]})

    def _draw(self, row: Row) -> None:
        """As TensorBoard's points."""
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def best(self, key: str) -> float:
        """The highest value of `key` in an evaluation so far; −1 without one."""
        return max((row.get(key, -1.0) for row in self.rows if row["kind"] == "eval"), default=-1.0)

    def sync(self) -> None:
        """The rows so far are on the disk on return, and the table and the events with them."""
        if self._behind:
            replace_file(self._jsonl, b"".join(map(_line, self.rows)))
            self._behind = False
        with open(self._jsonl, "rb") as file:
            os.fsync(file.fileno())
        replace_file(self.folder / "metrics.csv", _table(self.rows).encode())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._tracker is not None:
            self._tracker.finish()


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run's `metrics.jsonl`."""
    return _read(folder / "metrics.jsonl")


def _read(path: Path) -> list[Row]:
    """Whole lines; the last one may have been cut when its process died."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            log.warning("a line of %s is not readable and left out", path)
    return rows


def _scalars(row: Row) -> dict[str, float]:
    return {f"{row['kind']}/{key}": value for key, value in row.items() if key not in ("kind", "step", "epoch")}


def _line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _table(rows: list[Row]) -> str:
    """One line a step, a column for every value (`train_loss`, `eval_loss` …); empty where a step has none."""
    steps: dict[int, Row] = {}
    for row in rows:
        values = {name.replace("/", "_"): value for name, value in _scalars(row).items()}
        steps.setdefault(row["step"], {}).update(step=row["step"], epoch=row["epoch"], **values)
    columns = list(dict.fromkeys(key for row in steps.values() for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps.values())
    return text.getvalue()


def start_tracker(name: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    """The tracker's module, told of the run; None for "none". Raises InputError where it does not start."""
    tracker = import_tracker(name)
    if tracker is not None:
        try:
            place = {"dir": str(folder)} if name == "wandb" else {}  # where it writes its own files
            tracker.init(project="token-labeling", name=folder.name, config=dict(settings), **place)
        except Exception as error:  # the tracker's own: no account, no network
            remedy = "Its own manual tells more; run.tracker=none does without it."
            raise InputError(f"run.tracker {name!r} does not start", got=error, remedy=remedy) from None
    return tracker


def import_tracker(name: str) -> Any:
    """Its module; None for "none". Raises InputError where it is not installed."""
    if name == "none":
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"run.tracker {name!r} cannot be imported", got=error, remedy=f"pip install {name}, or run.tracker=none."
        ) from None
