"""The folder of a run, as its first rank writes it: settings, metrics, checkpoints, curves."""

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
from train.record.checkpoint import (
    FOLDER,
    CheckpointInfo,
    check_checkpoint,
    checkpoints,
    newest_checkpoint,
    remove_later,
    remove_old,
    save_checkpoint,
    sweep,
)
from train.record.curves import draw_run
from train.record.metrics import Metrics, start_tracker

log = logging.getLogger("train")

HISTORY = ("metrics.jsonl", "speed.jsonl")
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}


class RunRecord:
    """`step`: where the run goes on; what an earlier process told of later steps is dropped and will be told again.

    source     the checkpoint that it goes on from: where that is another run's, the history comes along
    went_back  the user named that checkpoint: later ones are removed
    evaluates_again  see `Metrics`
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
        self.folder, self._keep = folder, config.run.keep
        tracker = start_tracker(config.run.tracker, folder, flat(config))  # which may refuse
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if went_back:
            remove_later(folder, step)
        if source is not None and source.parent.name == FOLDER:
            _bring_history(source.parent.parent, folder, step)
        replace_file(folder / "config.toml", to_toml(config).encode())
        self.metrics = Metrics(folder, step, config.run.tensorboard, tracker, evaluates_again)

    def best(self) -> float:
        """The best top-1 of any evaluation, of weights or their average; −1 without one."""
        return max(self.metrics.best("top1"), self.metrics.best("ema_top1"))

    def best_step(self) -> int:
        """The step of the evaluation that was first as good as the best, whose checkpoint is kept; −1 without one."""
        tested = (row for row in self.metrics.rows if row["kind"] == "eval")
        best = self.best()
        return next((row["step"] for row in tested if best in (row["top1"], row.get("ema_top1"))), -1)

    def save(
        self,
        info: CheckpointInfo,
        weights: Mapping[str, torch.Tensor],
        ema: Mapping[str, torch.Tensor] | None,
        state: Mapping[str, Any] | None,
        must: bool = False,
    ) -> None:
        """A checkpoint to go on from; without `state` the best one so far.

        On a full disk the run goes on with its older checkpoints, unless this one is the last. Raises TrainError then.
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
            log.error("the checkpoint %s cannot be written: %s; training goes on, and %s", folder, why, kept)

    def finish(self) -> None:
        """Whatever ended the run: the table and the picture of what it told."""
        try:
            self.metrics.sync()
            self.metrics.close()
            draw_run(self.folder)
        except OSError as error:
            log.error("the tables and curves of %s cannot be written: %s", self.folder, error.strerror)


def _bring_history(old: Path, new: Path, step: int) -> None:
    """What another run told up to `step`, and the best checkpoint that it had by then."""
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
    """The run's folder for this process alone. Raises InputError where another trains in it."""
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
                f"another process trains in {str(folder)!r}", remedy="Wait for it, or choose another run.out."
            ) from None
        yield
    except BaseException:
        if not existed:
            _remove_unbegun(folder)
        raise
    finally:
        os.close(handle)


def _remove_unbegun(folder: Path) -> None:
    """A run that was refused leaves no folder behind."""
    with suppress(OSError):
        if os.listdir(folder) == ["run.lock"]:
            (folder / "run.lock").unlink()
            folder.rmdir()


def starting_point(folder: Path, resume: str | Path | None) -> tuple[Path, CheckpointInfo] | None:
    """The checkpoint to go on from; None: begin. See `fit`."""
    if resume is None:
        if found := checkpoints(folder):
            raise InputError(
                f"{str(folder)!r} holds a run already", got=found[0].name,
                remedy="Go on with --resume auto, or choose another folder with run.out=….",
            )  # fmt: skip
        return None
    if str(resume) == "auto":
        return newest_checkpoint(folder)
    path = Path(resume)
    home = path.parent.parent if path.parent.name == FOLDER else path
    if (found := checkpoints(folder)) and home.resolve() != folder.resolve():
        raise InputError(
            f"{str(folder)!r} holds another run than the one to go on from", got=found[0].name,
            remedy="Go on with --resume auto, or choose another folder with run.out=….",
        )  # fmt: skip
    if path.parent.name == FOLDER:
        return path, check_checkpoint(path)
    found_there = newest_checkpoint(path)
    if found_there is None:
        raise InputError(
            f"there is no checkpoint in {str(path)!r}", expected='"auto", a checkpoint, or a run\'s folder'
        )
    return found_there
