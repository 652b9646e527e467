"""Training runs that take a fraction of a second, and what two of them are compared by."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tiny import CLASSES, make_images

from labeler import LabelerConfig, TeacherConfig, label_images
from train.recipes.config import TrainConfig
from train.recipes.recipe import parse_config, to_toml
from train.record.checkpoint import CheckpointInfo, check_checkpoint, read_state, read_weights, save_checkpoint
from train.record.checkpoint_folders import FOLDER, checkpoints, remove_old
from train.record.metrics import read_rows

# Twelve images in batches of four: three steps an epoch.
TINY_RECIPE: dict[str, dict[str, Any]] = {
    "model": {
        "name": "demansia_nano",
        "img_size": 32,
        "args": {"patch_size": 8, "embed_dim": 16, "depth": 1, "d_state": 4},
    },
    "data": {"backend": "pil", "threads": 1, "prefetch": 1},
    "augment": {"scale": [0.5, 1.0], "auto_augment": "none"},
    "schedule": {"steps": 6},
    "run": {
        "batch_size": 4,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "tensorboard": False,
        "progress": False,
    },
}
# Everything that a resumed run could get wrong is on: random depth, mixed images, an average, evaluations.
FULL = {
    "model.drop_path_rate": 0.2,
    "model.args": {"patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 4},
    "augment.auto_augment": "rand-m9-mstd0.5-inc1",
    "augment.erase_prob": 0.5,
    "augment.mix": "token",
    "ema.decay": 0.9,
    "optimizer.clip_grad": 1.0,
    "schedule.steps": 9,
    "schedule.warmup_epochs": 0.5,
    "run.log_every": 2,
    "run.save_every": 2,
}


def tiny_config(images: Path, store: Path | None, out: Path, **overrides: Any) -> TrainConfig:
    """A recipe for twelve 32×32 images on one CPU thread; overrides are {"section.key": value}.

    Without `store` it is plain classification. Without data.validation nothing is evaluated: the teacher of
    `tiny.py` knows six classes, so that takes images in six folders, as those of `tiny_data`.
    """
    values = {name: dict(section) for name, section in TINY_RECIPE.items()}
    values["data"]["images"] = str(images)
    values["data"] |= {"token_labels": False} if store is None else {"store": str(store)}
    values["run"]["out"] = str(out)
    for key, value in overrides.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return parse_config(_plain(values), "the tiny recipe")


def tiny_data(folder: Path, count: int = 12) -> tuple[Path, Path]:
    """`count` images in six class folders, one for each class of the teacher, and their label store."""
    images, store = make_images(folder / "images", count, CLASSES), folder / "labels"
    teacher = TeacherConfig("tiny:colour_teacher")
    label_images(
        images, store, LabelerConfig(teacher, shard_size=4, batch_size=4, decoder="pil", threads=1, progress=False)
    )
    return images, store


def write_recipe(config: TrainConfig, path: Path) -> Path:
    path.write_text(to_toml(config))
    return path


def outcome(run: Path) -> dict[str, Any]:
    """All that must not depend on interruptions: last checkpoint and best one, bit for bit, and the rows of metrics."""
    return {
        "last": contents(checkpoints(run)[0]),
        "best": [contents(folder) for folder in checkpoints(run, "best")],
        "rows": read_rows(run),
    }


def contents(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds; one number differs if any bit of a tensor does."""
    info = check_checkpoint(folder)
    found: dict[str, Any] = {
        "folder": folder.name,
        "accuracy": info.accuracy,
        "weights": digests(read_weights(folder, info)),
    }
    if "ema.safetensors" in info.files:
        found["ema"] = digests(read_weights(folder, info, ema=True))
    if "state.pt" in info.files:
        found["state"] = digests(read_state(folder, info))
    return found


def digests(value: Any) -> Any:
    """The same structure with a digest of every tensor, and every number to its last bit.

    The bytes of a pickled state may differ where its values do not.
    """
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, Mapping):
        return {repr(key): digests(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [digests(item) for item in value]
    return repr(value)


def _events(path: Path) -> Iterator[Any]:
    """Of a file: each stands between its length with a checksum, and its own checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + size])
        at += size + 16


def shown(run: Path) -> list[tuple[str, int, float]]:
    """The points that TensorBoard shows: where a file begins with a step, older points from that step on are purged."""
    points: list[tuple[str, int, float]] = []
    for path in sorted((run / "tensorboard").iterdir()):
        for event in _events(path):
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[1] < event.step]
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return points


def save_small_checkpoint(run: str, step: int, keep: int) -> None:
    """A checkpoint of a few numbers that tell its step, as a run saves it."""
    weights = {"weight": torch.full((5,), float(step))}
    info = CheckpointInfo(step, 0, {}, 2, 0.0, [], {}, {}, {}, 1, 1)
    folder = Path(run) / FOLDER / f"step-{step:08d}"
    save_checkpoint(folder, info, weights, weights, {"step": step})
    remove_old(folder, keep)


def fit_on_a_small_disk(recipe: str, disk: str, size: str, kept: str) -> int:
    """The exit status of a run onto a file system of `size`, whose files are then copied to `kept`; 77: none to be had.

    To be called in a process of its own: only that one has the file system.
    """
    import ctypes
    import subprocess

    from train.__main__ import main

    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        return 77
    private = ["mount", "--make-rprivate", "/"]
    if any(subprocess.call(c) for c in (private, ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk])):
        return 77
    status = main(["fit", recipe])
    shutil.copytree(disk, kept)
    return status


def _plain(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(values, default=str))
