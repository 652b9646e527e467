"""Checkpoints: folders that are either absent or complete, with a digest of every file.

    step-00000400/     weights.safetensors  ema.safetensors  state.pt  checkpoint.json
    best-00000300/     the same without state.pt

Of a run with adapters they hold adapters and heads; the frozen weights are in the run's folder: `base.safetensors`.

`checkpoint.json` describes the model, so that it can be rebuilt, and lists size and sha256 of the other files. A folder
is written under a temporary name, synced to disk and renamed, so that a process that dies leaves older ones intact.
"""

from __future__ import annotations

import hashlib
import io
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
from labeler.base.whole_files import TEMPORARY, read_sealed, replace_file, sealed, sync_folder
from train.record.adapter_weights import merge_adapters

RECORD, WEIGHTS, EMA, STATE, BASE = (
    "checkpoint.json",
    "weights.safetensors",
    "ema.safetensors",
    "state.pt",
    "base.safetensors",
)


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of a file.

    Attributes:
        size: in bytes.
        sha256: hexadecimal.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class AdapterRecord:
    """What the weights of a checkpoint of adapters go with.

    Attributes:
        scale: factor of the adapters' products.
        base: `base.safetensors` in the run's folder: the frozen weights.
    """

    scale: float
    base: FileRecord


@dataclass(frozen=True)
class CheckpointInfo:
    """The record of a checkpoint.

    Attributes:
        step: steps done.
        epoch: epochs started.
        model: settings that rebuild the model (`train.recipes.config.ModelConfig`).
        num_classes: classes of the class head.
        aux_weight: weight of the auxiliary head in evaluation.
        class_names: one for each class, or empty.
        class_folders: folder or label -> class id.
        transform: preprocessing of evaluation images: mean, std, crop_pct, crop_mode, orientation.
        config: the run's resolved recipe.
        world_size: number of ranks.
        threads: torch's CPU threads.
        accuracy: top-1 and top-5 of the weights and of the moving average at that step, if it was evaluated.
        files: name -> size and sha256.
        classes: "teacher" or "images": whose classes those of the class head are.
        aux_classes: classes of the auxiliary head; None: those of the class head.
        aux_class_names: one for each of them, or empty.
        adapter: of a run with adapters, whose weights are those of adapters and heads alone; None: they are all.
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
    classes: str = "teacher"
    aux_classes: int | None = None
    aux_class_names: list[str] = field(default_factory=list)
    adapter: AdapterRecord | None = None


_INFO = TypeAdapter(CheckpointInfo)


def save_checkpoint(
    folder: Path,
    info: CheckpointInfo,
    weights: Mapping[str, torch.Tensor],
    ema: Mapping[str, torch.Tensor] | None,
    state: Mapping[str, Any] | None,
) -> None:
    """Write a checkpoint; it is on the disk on return. An existing, undamaged one is kept.

    Args:
        folder: the checkpoint's folder.
        info: its record; `files` is filled in.
        weights: the network's state dict.
        ema: that of the moving average; None: no average.
        state: resume state; None: none.

    Raises:
        OSError: it cannot be written; nothing of it is left.
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
    """Verify all files of a checkpoint.

    Args:
        folder: the checkpoint's folder.

    Returns:
        Its record.

    Raises:
        IntegrityError: it is not a checkpoint, or a file is missing or damaged.
    """
    try:
        info = _INFO.validate_python(read_sealed(folder / RECORD))
    except FileNotFoundError:
        raise IntegrityError(f"{folder} is not a checkpoint", got=f"no {RECORD}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        got = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        raise IntegrityError(f"{folder / RECORD} is not a checkpoint's record", got=got) from None
    except (IntegrityError, OSError) as error:
        got = str(error.got if isinstance(error, IntegrityError) else error)
        raise IntegrityError(f"{folder / RECORD} is damaged", got=got) from None
    if not {WEIGHTS} <= info.files.keys() <= {WEIGHTS, EMA, STATE}:
        raise IntegrityError(
            f"{folder / RECORD} is not a checkpoint's record", got=f"files {', '.join(info.files) or 'none'}",
            expected=f"{WEIGHTS}, optionally {EMA} and {STATE}",
        )  # fmt: skip
    for name, expected in info.files.items():
        _read(folder, name, expected)
    return info


def write_base(run: Path, weights: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write the frozen weights of a run with adapters, unless they are there. Returns size and digest of the file."""
    data = _tensors(weights)
    record = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    try:
        _read(run, BASE, record)
    except IntegrityError:
        replace_file(run / BASE, data)
    return record


def read_weights(folder: Path, info: CheckpointInfo, ema: bool = False, merged: bool = True) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint.

    Args:
        folder: the checkpoint's folder.
        info: its record.
        ema: read the moving average instead.
        merged: of adapters: the plain network's state dict; otherwise that of the network with adapters.

    Returns:
        A state dict.

    Raises:
        InputError: the checkpoint has no moving average.
        IntegrityError: the file is damaged.
    """
    name = EMA if ema else WEIGHTS
    if name not in info.files:
        raise InputError(
            f"{folder} has no averaged weights", remedy="Use its plain weights, without `ema` or model.weights_ema."
        )
    state = _read_tensors(folder, name, info.files[name])
    if info.adapter is None:
        return state
    run = folder.parents[1]
    if not (run / BASE).exists():
        remedy = "A checkpoint of adapters needs it: leave it in its run's folder, or use the run's timm/."
        raise IntegrityError(f"{run / BASE} is missing", remedy=remedy)
    state = {**_read_tensors(run, BASE, info.adapter.base), **state}
    return merge_adapters(state, info.adapter.scale) if merged else state


def read_state(folder: Path, info: CheckpointInfo) -> dict[str, Any]:
    """Read the resume state other than the weights: plain values and tensors; no code in the file is run.

    Args:
        folder: the checkpoint's folder.
        info: its record.

    Returns:
        The state.

    Raises:
        InputError: the checkpoint has no resume state.
        IntegrityError: the file is damaged, or is not plain data.
    """
    if STATE not in info.files:
        raise InputError(f"{folder} has no training state", remedy="Resume from a step-… checkpoint.")
    data = _read(folder, STATE, info.files[STATE])
    try:
        return load_plain(data)
    except Exception as error:  # torch raises many types, among them UnpicklingError for code
        raise IntegrityError(
            f"{folder / STATE} is not plain data", got=(str(error).splitlines() or ["none"])[0][:200],
            remedy="None of its code was run. Use a checkpoint that you trust.",
        ) from None  # fmt: skip


def _tensors(state: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def _read_tensors(folder: Path, name: str, expected: FileRecord) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _read(folder, name, expected)
    try:
        return load(data)
    except SafetensorError as error:
        raise IntegrityError(f"{folder / name} is not a safetensors file", got=error) from None


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
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected.sha256:
        raise IntegrityError(
            f"{path} is damaged", got=f"sha256 {digest[:12]}…", expected=f"sha256 {expected.sha256[:12]}…"
        )
    return data
