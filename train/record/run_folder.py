"""The folder of a run, written by its first rank: settings, metrics, checkpoints, curves."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from labeler.base.errors import InputError
from labeler.base.whole_files import TEMPORARY, replace_file
from train.errors import TrainError
from train.recipes.config import TrainConfig
from train.recipes.recipe import flat, to_toml
from train.record.checkpoint import CheckpointInfo, check_checkpoint, save_checkpoint
from train.record.checkpoint_folders import FOLDER, checkpoints, newest_checkpoint, remove_later, remove_old, sweep
from train.record.curves import draw_run
from train.record.metrics import Metrics, start_tracker

log = logging.getLogger("train")

HISTORY = ("metrics.jsonl", "speed.jsonl")
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}


class RunRecord:
    """Writes the files of a run.

    Args:
        folder: the run's folder.
        config: its recipe.
        step: the step to continue from; rows of metrics after it are dropped, as they will be written again.
        source: the checkpoint to continue from; if it belongs to another run, that run's history is copied.
        went_back: the user named the checkpoint: later ones are removed.
        evaluates_again: see `Metrics`.

    Raises:
        InputError: the tracker does not start.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        step: int,
        source: Path | None = None,
        went_back: bool = False,
        evaluates_again: bool = True,
    ) -> None:
        self.folder, self._keep, self._measure = folder, config.run.keep, config.measures[0]
        tracker = start_tracker(config.run.tracker, folder, flat(config))  # before anything is written: may raise
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if went_back:
            remove_later(folder, step)
        if source is not None and source.parent.name == FOLDER:
            _copy_history(source.parent.parent, folder, step)
        replace_file(folder / "config.toml", to_toml(config).encode())
        self.metrics = Metrics(folder, step, config.run.tensorboard, tracker, evaluates_again)

    def best(self) -> float:
        """The best accuracy of any evaluation, of the weights or their moving average; −1: no evaluation."""
        return max(self.metrics.best(self._measure), self.metrics.best(f"ema_{self._measure}"))

    def best_step(self) -> int:
        """The step of the first evaluation with the best accuracy, whose checkpoint is kept; −1: no evaluation."""
        evaluations = (row for row in self.metrics.rows if row["kind"] == "eval")
        best, key = self.best(), self._measure
        return next((row["step"] for row in evaluations if best in (row[key], row.get(f"ema_{key}"))), -1)

    def save(
        self,
        info: CheckpointInfo,
        weights: Mapping[str, torch.Tensor],
        ema: Mapping[str, torch.Tensor] | None,
        state: Mapping[str, Any] | None,
        must: bool = False,
    ) -> None:
        """Save a checkpoint.

        If the disk is full, the run continues with its older checkpoints, unless `must` is set.

        Args:
            info: its record.
            weights: the network's state dict.
            ema: that of the moving average; None: no average.
            state: resume state; None: this is the best checkpoint so far, without one.
            must: raise an error if it cannot be written.

        Raises:
            TrainError: it cannot be written, and `must` is set.
        """
        kind, keep = ("best", 1) if state is None else ("step", self._keep)
        folder = self.folder / FOLDER / f"{kind}-{info.step:08d}"
        try:
            self.metrics.sync()
            save_checkpoint(folder, info, weights, ema, state)
            remove_old(folder, keep)
        except OSError as error:
            older = checkpoints(self.folder)
            kept = f"the newest one kept is {older[0]}" if older else "there is no older one"
            why = FULL.get(error.errno or 0, error.strerror)
            if must:
                raise TrainError(f"the checkpoint {folder} cannot be written", got=why, remedy=f"{kept}.") from None
            log.error("the checkpoint %s cannot be written: %s; training continues, and %s", folder, why, kept)

    def finish(self) -> None:
        """Write the table and the curves; called however the run ended."""
        try:
            self.metrics.sync()
            self.metrics.close()
            draw_run(self.folder)
        except OSError as error:
            log.error("the tables and curves of %s cannot be written: %s", self.folder, error.strerror)


def _copy_history(old: Path, new: Path, step: int) -> None:
    """Copy the metrics of another run, and its best checkpoint up to `step`."""
    if old.resolve() == new.resolve():
        return
    for name in HISTORY:
        if (old / name).is_file():
            replace_file(new / name, (old / name).read_bytes())
    best = next((path for path in checkpoints(old, "best") if int(path.name.rpartition("-")[2]) <= step), None)
    if best is None or (new / FOLDER / best.name).exists():
        return
    temporary = new / FOLDER / f"{TEMPORARY}{best.name}"
    shutil.copytree(best, temporary)
    os.rename(temporary, new / FOLDER / best.name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process.

    Args:
        folder: the run's folder; created if it does not exist.

    Raises:
        InputError: another process trains in it, or it cannot be written.
    """
    existed = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"run.out {str(folder)!r} cannot be written", got=error.strerror) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is training in {str(folder)!r}", remedy="Wait for it, or choose another run.out."
            ) from None
        yield
    except BaseException:
        if not existed:
            _remove_unbegun(folder)
        raise
    finally:
        os.close(handle)


def _remove_unbegun(folder: Path) -> None:
    """Remove the folder of a run that was refused before it wrote anything."""
    with suppress(OSError):
        if os.listdir(folder) == ["run.lock"]:
            (folder / "run.lock").unlink()
            folder.rmdir()


def starting_point(folder: Path, resume: str | Path | None) -> tuple[Path, CheckpointInfo] | None:
    """Find the checkpoint to continue from.

    Args:
        folder: the run's folder.
        resume: as for `fit`.

    Returns:
        The checkpoint and its record; None: start a new run.

    Raises:
        InputError: the folder already contains a run, or there is no such checkpoint.
        IntegrityError: the checkpoint is damaged.
    """
    if resume is None:
        if existing := checkpoints(folder):
            raise InputError(
                f"{str(folder)!r} already contains a run", got=existing[0].name,
                remedy="Continue it with `resume=auto`, or choose another folder with run.out=….",
            )  # fmt: skip
        return None
    if str(resume) == "auto":
        return newest_checkpoint(folder)
    path = Path(resume)
    home = path.parent.parent if path.parent.name == FOLDER else path
    if (existing := checkpoints(folder)) and home.resolve() != folder.resolve():
        raise InputError(
            f"{str(folder)!r} contains another run than the one to continue from", got=existing[0].name,
            remedy="Continue it with `resume=auto`, or choose another folder with run.out=….",
        )  # fmt: skip
    if path.parent.name == FOLDER:
        return path, check_checkpoint(path)
    newest = newest_checkpoint(path)
    if newest is None:
        raise InputError(
            f"there is no checkpoint in {str(path)!r}", expected='"auto", a checkpoint, or a run\'s folder'
        )
    return newest
