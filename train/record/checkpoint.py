"""Checkpoints: folders that are either absent or whole, with a digest of every file.

    step-00000400/     weights.safetensors  ema.safetensors  state.pt  checkpoint.json
    best-00000300/     the same without state.pt

`checkpoint.json` describes the model, so that it can be built again, and has size and sha256 of the other files. A
folder is written under another name, synced to the disk, and renamed: a process that dies leaves the older ones as they
were.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from labeler.base.errors import InputError, IntegrityError
from labeler.base.plain_tensors import load_plain
from labeler.base.whole_files import TEMPORARY, read_sealed, sealed, sync_folder

log = logging.getLogger("train")

RECORD, WEIGHTS, EMA, STATE = "checkpoint.json", "weights.safetensors", "ema.safetensors", "state.pt"
FOLDER = "checkpoints"  # within a run's folder


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass(frozen=True)
class CheckpointInfo:
    """
    step, epoch    steps done, and epochs begun
    model          the settings that build the model again (`train.recipes.config.ModelConfig`)
    aux_weight     of the auxiliary head in evaluation
    class_names    one for each class, or empty; class_folders  folder name -> class id
    transform      mean, std, crop_pct, crop_mode, orientation: how images reach the model
    config         the run's resolved recipe
    world_size, threads  of the run
    accuracy       top-1 at that step, weights and averaged weights, where it was evaluated
    files          name -> size and sha256
    """

    step: int
    epoch: int
    model: dict[str, Any]
    num_classes: int
    aux_weight: float
    class_names: list[str]
    class_folders: dict[str, int]
    transform: dict[str, Any]
    config: dict[str, Any]
    world_size: int
    threads: int
    accuracy: dict[str, float] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)


_INFO = TypeAdapter(CheckpointInfo)


def save_checkpoint(
    folder: Path,
    info: CheckpointInfo,
    weights: Mapping[str, torch.Tensor],
    ema: Mapping[str, torch.Tensor] | None,
    state: Mapping[str, Any] | None,
) -> None:
    """Write the checkpoint `folder`; durable on return. One that is there already and whole stays.

    Raises OSError where the disk does not take it; nothing of it is left then.
    """
    if folder.exists():
        try:
            check_checkpoint(folder)
            return
        except IntegrityError:
            shutil.rmtree(folder)
    contents = {WEIGHTS: _tensors(weights)}
    if ema is not None:
        contents[EMA] = _tensors(ema)
    if state is not None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        contents[STATE] = buffer.getvalue()
    files = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    record = asdict(info) | {"files": files}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        for name, data in {**contents, RECORD: sealed(record)}.items():
            _write(temporary / name, data)
        sync_folder(temporary)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def check_checkpoint(folder: Path) -> CheckpointInfo:
    """The record of a checkpoint whose every file is as it was written. Raises IntegrityError."""
    try:
        info = _INFO.validate_python(read_sealed(folder / RECORD))
    except FileNotFoundError:
        raise IntegrityError(f"{folder} is no checkpoint", got=f"no {RECORD}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        got = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        raise IntegrityError(f"{folder / RECORD} is no record of a checkpoint", got=got) from None
    except (IntegrityError, OSError) as error:
        got = str(error.got if isinstance(error, IntegrityError) else error)
        raise IntegrityError(f"{folder / RECORD} is damaged", got=got) from None
    if not {WEIGHTS} <= info.files.keys() <= {WEIGHTS, EMA, STATE}:
        raise IntegrityError(
            f"{folder / RECORD} is no record of a checkpoint", got=f"files {', '.join(info.files) or 'none'}",
            expected=f"{WEIGHTS}, perhaps {EMA} and {STATE}",
        )  # fmt: skip
    for name, expected in info.files.items():
        _read(folder, name, expected)
    return info


def checkpoints(run: Path, kind: str = "step") -> list[Path]:
    """The checkpoints of a run's folder, newest first; kind: "step" or "best"."""
    return sorted((run / FOLDER).glob(f"{kind}-????????"), reverse=True)


def newest_checkpoint(run: Path, kind: str = "step") -> tuple[Path, CheckpointInfo] | None:
    """The newest whole checkpoint of a run; None where there is none at all.

    Says so where a newer one is damaged. Raises IntegrityError where all are.
    """
    found = checkpoints(run, kind)
    for folder in found:
        try:
            info = check_checkpoint(folder)
        except IntegrityError as error:
            log.warning("%s; trying the one before it", error)
        else:
            return folder, info
    if found:
        raise IntegrityError(
            f"all checkpoints below {run} are damaged", got=", ".join(path.name for path in found),
            remedy="Restore one from a backup, or begin again in another folder with run.out=….",
        )  # fmt: skip
    return None


def find_checkpoint(path: Path) -> tuple[Path, CheckpointInfo]:
    """A checkpoint by its folder, or by its run's: the best one there, else the newest."""
    if (path / RECORD).exists():
        return path, check_checkpoint(path)
    found = newest_checkpoint(path, "best") or newest_checkpoint(path)
    if found is None:
        raise InputError(
            f"there is no checkpoint in {path}", got=f"neither {RECORD} nor {FOLDER}/",
            expected="a run's folder, or one of its checkpoints",
        )  # fmt: skip
    return found


def checkpoint_of(file: Path) -> tuple[Path, CheckpointInfo, bool] | None:
    """The checkpoint that a file of weights lies in, and whether they are the averaged ones; None: it lies in none."""
    if file.name not in (WEIGHTS, EMA) or not (file.parent / RECORD).is_file():
        return None
    return file.parent, check_checkpoint(file.parent), file.name == EMA


def read_weights(folder: Path, info: CheckpointInfo, ema: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or their moving average."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = EMA if ema else WEIGHTS
    if name not in info.files:
        raise InputError(
            f"{folder} has no averaged weights", remedy="Take its plain weights, without --ema or model.weights_ema."
        )
    data = _read(folder, name, info.files[name])
    try:
        return load(data)
    except SafetensorError as error:
        raise IntegrityError(f"{folder / name} is no safetensors file", got=error) from None


def read_state(folder: Path, info: CheckpointInfo) -> dict[str, Any]:
    """What goes on from a checkpoint needs beside weights: plain values and tensors; nothing in the file is run."""
    if STATE not in info.files:
        raise InputError(f"{folder} has no training state", remedy="Resume from a step-… checkpoint.")
    data = _read(folder, STATE, info.files[STATE])
    try:
        return load_plain(data)
    except Exception as error:  # torch raises many types, among them UnpicklingError for code
        raise IntegrityError(
            f"{folder / STATE} is no file of plain values", got=(str(error).splitlines() or ["none"])[0][:200],
            remedy="Nothing of it was run. Use a checkpoint that you trust.",
        ) from None  # fmt: skip


def remove_old(folder: Path, keep: int) -> None:
    """Leave `folder`, just saved, and of its kind the newest before it, `keep` together.

    Later ones stay: a run that went on from before a damaged one comes to their steps again.
    """
    kind = folder.name.partition("-")[0]
    for old in [path for path in checkpoints(folder.parent.parent, kind) if path.name <= folder.name][keep:]:
        _remove(old)


def remove_later(run: Path, step: int) -> None:
    """Remove a run's checkpoints after `step`, where it was asked to go back: they would win over those to come."""
    for folder in checkpoints(run) + checkpoints(run, "best"):
        if int(folder.name.rpartition("-")[2]) > step:
            log.warning("%s is removed: the run goes on from step %d", folder, step)
            _remove(folder)


def _remove(folder: Path) -> None:
    # Renamed first: one that is removed half-way would look damaged.
    gone = folder.with_name(f"{TEMPORARY}{folder.name}-{secrets.token_hex(4)}")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove what a process that died left half-written. Only for who holds the run's lock."""
    for path in (run / FOLDER).glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _tensors(state: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def _read(folder: Path, name: str, expected: FileRecord) -> bytes:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.size:
            raise IntegrityError(f"{path} is damaged", got=f"{size:,} bytes", expected=f"{expected.size:,}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing") from None
    found = hashlib.sha256(data).hexdigest()
    if found != expected.sha256:
        raise IntegrityError(
            f"{path} is damaged", got=f"sha256 {found[:12]}…", expected=f"sha256 {expected.sha256[:12]}…"
        )
    return data
