"""The checkpoints of a run: finding the right one, and removing old ones.

They are the folders `checkpoints/step-00000400/` and `checkpoints/best-00000300/` of the run's folder.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from pathlib import Path

from labeler.base.errors import InputError, IntegrityError
from labeler.base.whole_files import TEMPORARY
from train.record.checkpoint import EMA, RECORD, WEIGHTS, CheckpointInfo, check_checkpoint

log = logging.getLogger("train")

FOLDER = "checkpoints"  # within a run's folder


def checkpoints(run: Path, kind: str = "step") -> list[Path]:
    """The checkpoints of a run's folder, newest first; kind: "step" or "best"."""
    return sorted((run / FOLDER).glob(f"{kind}-????????"), reverse=True)


def newest_checkpoint(run: Path, kind: str = "step") -> tuple[Path, CheckpointInfo] | None:
    """The newest undamaged checkpoint of a run; logs a warning for each damaged one.

    Args:
        run: the run's folder.
        kind: "step" or "best".

    Returns:
        Its folder and record; None: the run has no checkpoint.

    Raises:
        IntegrityError: all checkpoints are damaged.
    """
    folders = checkpoints(run, kind)
    for folder in folders:
        try:
            info = check_checkpoint(folder)
        except IntegrityError as error:
            log.warning("%s; trying the one before it", error)
        else:
            return folder, info
    if folders:
        raise IntegrityError(
            f"all checkpoints below {run} are damaged", got=", ".join(path.name for path in folders),
            remedy="Restore one from a backup, or start again in another folder with run.out=….",
        )  # fmt: skip
    return None


def find_checkpoint(path: Path) -> tuple[Path, CheckpointInfo]:
    """Find a checkpoint by its folder or its run's.

    Args:
        path: a checkpoint, or a run's folder, for its best checkpoint, or else its newest.

    Returns:
        Its folder and record.

    Raises:
        InputError: there is no checkpoint.
        IntegrityError: it is damaged.
    """
    if (path / RECORD).exists():
        return path, check_checkpoint(path)
    checkpoint = newest_checkpoint(path, "best") or newest_checkpoint(path)
    if checkpoint is None:
        raise InputError(
            f"there is no checkpoint in {path}", got=f"neither {RECORD} nor {FOLDER}/",
            expected="a run's folder, or one of its checkpoints",
        )  # fmt: skip
    return checkpoint


def checkpoint_of(file: Path) -> tuple[Path, CheckpointInfo, bool] | None:
    """The checkpoint that a file of weights belongs to.

    Args:
        file: a file.

    Returns:
        The checkpoint's folder and record, and whether the weights are the averaged ones; None: the file belongs to no
        checkpoint.
    """
    if file.name not in (WEIGHTS, EMA) or not (file.parent / RECORD).is_file():
        return None
    return file.parent, check_checkpoint(file.parent), file.name == EMA


def remove_old(folder: Path, keep: int) -> None:
    """Remove old checkpoints.

    Later ones than `folder` stay: a run that continued from before a damaged one reaches their steps again.

    Args:
        folder: the checkpoint that was just saved.
        keep: how many to keep of its kind, this one and the newest before it.
    """
    kind = folder.name.partition("-")[0]
    for old in [path for path in checkpoints(folder.parent.parent, kind) if path.name <= folder.name][keep:]:
        _remove(old)


def remove_later(run: Path, step: int) -> None:
    """Remove a run's checkpoints after `step`, when it goes back to one: they would count as newer than those to come.

    Args:
        run: the run's folder.
        step: the step to go back to.
    """
    for folder in checkpoints(run) + checkpoints(run, "best"):
        if int(folder.name.rpartition("-")[2]) > step:
            log.warning("%s is removed: the run continues from step %d", folder, step)
            _remove(folder)


def _remove(folder: Path) -> None:
    # Renamed first: a half-removed checkpoint would look damaged.
    gone = folder.with_name(f"{TEMPORARY}{folder.name}-{secrets.token_hex(4)}")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove half-written files of processes that died. The caller must hold the run's lock."""
    for path in (run / FOLDER).glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
