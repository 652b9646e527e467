"""The .pt files of TokenLabeling and ReLabel: which belongs to which image, and what one holds.

Legend: P palette size; H×W map grid.

Such a file has one tensor [2, 5, H, W]: the five largest logits of each cell, descending, and their class ids. All
other classes count as logit 0, which is also the meaning of score 0 and of the background in a `logit` store.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from labeler.base.errors import InputError
from labeler.base.plain_tensors import load_plain
from labeler.sources.image_source import BadImage, ImageSource

MAX_FILE_BYTES = 16 << 20  # a map of 5 classes on a 400×400 grid; the real ones have 18×18
MAX_PICKLE = 64 << 10  # the single tensor of a map needs 200 bytes


def match_files(images: ImageSource, maps: Path) -> dict[str, Path | str]:
    """Returns image key -> the file of its map, or why there is none. Raises InputError if no image has a map."""
    short = Counter(_cut_at_first_dot(key) for key in images.keys)
    files: dict[str, Path | str] = {}
    for key in images.keys:
        exact, cut = maps / f"{key.rpartition('.')[0]}.pt", _cut_at_first_dot(key)
        if exact.is_file():
            files[key] = exact
        elif (maps / f"{cut}.pt").is_file():
            unique = short[cut] == 1
            files[key] = maps / f"{cut}.pt" if unique else f"{cut}.pt could be the map of {short[cut]} images"
        else:
            files[key] = "no map file"
    if not any(isinstance(value, Path) for value in files.values()):
        raise InputError(
            f"no map below {str(maps)!r} belongs to an image",
            expected=f"for example {maps / images.keys[0].rpartition('.')[0]!s}.pt",
        )
    return files


def _cut_at_first_dot(key: str) -> str:
    """Returns a key up to the first dot of its last part."""
    folder, _, name = key.rpartition("/")
    stem = name.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def read_map(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads (logits float16 [5, H, W], class ids int64 [5, H, W]) of a map, without running code. Raises BadImage."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadImage(f"{path.name} is larger than any label map ({path.stat().st_size:,} bytes)")
        tensor = load_plain(path, max_pickle=MAX_PICKLE)
    except BadImage:
        raise
    except Exception as error:  # torch raises errors of many types on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise BadImage(f"{path.name} cannot be read: {reason}") from None
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4 or tensor.shape[0] != 2 or tensor.shape[1] > 64:
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise BadImage(f"{path.name} holds {shape}, expected a tensor [2, 5, H, W]")
    if tensor.numel() * 2 > MAX_FILE_BYTES:
        raise BadImage(f"{path.name} holds {tuple(tensor.shape)}, more than any label map")
    values, ids = tensor.half().numpy(), tensor[1].double().numpy()
    if not np.isfinite(values[0]).all():
        raise BadImage(f"{path.name} has logits that are not finite")
    if not ((ids >= 0) & (ids < num_classes) & (ids == np.floor(ids))).all():
        raise BadImage(
            f"{path.name}: its second half has no class ids below {num_classes}; are values and ids swapped?"
        )
    ids = ids.astype(np.int64)
    ordered = np.sort(ids, axis=0)
    if (ordered[1:] == ordered[:-1]).any():
        raise BadImage(f"{path.name} names a class twice in one cell")
    return values[0], ids


def to_palette(values: np.ndarray, ids: np.ndarray, palette: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Converts a map to (class ids int64 [P], −1 unused; scores float16 [P, H, W]), the largest class first."""
    weights = np.exp(values.astype(np.float64))
    share = weights / (weights.sum(0) + num_classes - len(values))
    classes, index = np.unique(ids, return_inverse=True)
    index = index.reshape(ids.shape)
    total = np.bincount(index.ravel(), share.ravel(), len(classes))
    order = np.argsort(-total, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    scores = np.zeros((palette, *values.shape[1:]), np.float16)
    np.put_along_axis(scores, rank[index], values, axis=0)
    return np.pad(classes[order], (0, palette - len(classes)), constant_values=-1), scores
