"""Metrics of a run: `metrics.jsonl` and `.csv`, `speed.jsonl`, TensorBoard events, and trackers.

`metrics.jsonl` contains only what the run computes, which is the same however often it was interrupted; its speed is in
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
    """Writes rows {"kind": "train" | "eval", "step": …, …}.

    Args:
        folder: the run's folder.
        step: the step to continue from; later rows of the files are removed.
        tensorboard: also write TensorBoard events.
        tracker: from `start_tracker`; None: none.
        evaluates_again: the run starts with the evaluation at `step`, which may not have been finished.

    Attributes:
        rows: all rows so far.
    """

    def __init__(
        self, folder: Path, step: int, tensorboard: bool, tracker: Any = None, evaluates_again: bool = True
    ) -> None:

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

            # File names contain seconds; the step keeps two runs within one second apart.
            suffix = f".step-{step:08d}"
            first = 0 if not (folder / "tensorboard").exists() else step
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step, filename_suffix=suffix)
            # TensorBoard also drops the points at `purge_step`, and has never seen a history copied from another run.
            rows = [*self.rows, *({"kind": "speed", **row} for row in speed)]
            for row in (row for row in rows if row["step"] >= first):
                self._draw(row)
        self._tracker = tracker

    def add(self, row: Row) -> None:
        """Append a row of metrics."""
        self.rows.append(row)
        self._append(self._jsonl, row)
        self._report(row)

    def add_speed(self, row: Row) -> None:
        """Append a row to `speed.jsonl`."""
        self._append(self.folder / "speed.jsonl", row)
        self._report({"kind": "speed", **row})

    def _append(self, path: Path, row: Row) -> None:
        """Append a line to a file. On a full disk the row is kept for the next `sync`, and training continues."""
        try:
            with open(path, "ab") as file:
                file.write(_line(row))
        except OSError as error:
            log.error("%s cannot be written: %s; training continues", path, error.strerror)
            self._behind = True

    def _report(self, row: Row) -> None:
        if self._writer is not None:
            self._draw(row)
        if self._tracker is not None:
            self._tracker.log({**_scalars(row), "step": row["step"]})

    def _draw(self, row: Row) -> None:
        """Write a row as TensorBoard points."""
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def best(self, key: str) -> float:
        """The highest value of `key` in any evaluation so far; −1: no evaluation."""
        return max((row.get(key, -1.0) for row in self.rows if row["kind"] == "eval"), default=-1.0)

    def sync(self) -> None:
        """Flush all rows, the table and the TensorBoard events to disk."""
        if self._behind:
            replace_file(self._jsonl, b"".join(map(_line, self.rows)))
            self._behind = False
        with open(self._jsonl, "rb") as file:
            os.fsync(file.fileno())
        replace_file(self.folder / "metrics.csv", _table(self.rows).encode())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the TensorBoard writer and the tracker."""
        if self._writer is not None:
            self._writer.close()
        if self._tracker is not None:
            self._tracker.finish()


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run's `metrics.jsonl`."""
    return _read(folder / "metrics.jsonl")


def _read(path: Path) -> list[Row]:
    """All complete lines; the last one may be cut off if the process died."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            log.warning("a line of %s cannot be read and is skipped", path)
    return rows


def _scalars(row: Row) -> dict[str, float]:
    return {f"{row['kind']}/{key}": value for key, value in row.items() if key not in ("kind", "step", "epoch")}


def _line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _table(rows: list[Row]) -> str:
    """CSV: one line per step, a column for each value (`train_loss`, `eval_loss` …), empty if a step has none."""
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
    """Start a tracker.

    Args:
        name: "wandb", "trackio" or "none".
        folder: the run's folder, whose name becomes the run's.
        settings: the recipe, as `section.key` -> value.

    Returns:
        The tracker's module; None for "none".

    Raises:
        InputError: it is not installed, or does not start.
    """
    tracker = import_tracker(name)
    if tracker is not None:
        try:
            kwargs = {"dir": str(folder)} if name == "wandb" else {}  # for its own files
            tracker.init(project="token-labeling", name=folder.name, config=dict(settings), **kwargs)
        except Exception as error:  # the tracker's own: no account, no network
            remedy = "See its documentation, or set run.tracker=none."
            raise InputError(f"run.tracker {name!r} does not start", got=error, remedy=remedy) from None
    return tracker


def import_tracker(name: str) -> Any:
    """Import a tracker's module; None for "none". Raises InputError if it is not installed."""
    if name == "none":
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"run.tracker {name!r} cannot be imported", got=error, remedy=f"pip install {name}, or run.tracker=none."
        ) from None
