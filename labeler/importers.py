"""TokenLabeling and ReLabel maps to a label store of kind `logit`, bit for bit.

Legend: N images; C classes; P palette size; H×W map grid.

Such a file holds one tensor [2, 5, H, W]: of each cell the five largest logits, falling, and their class ids. Every
other class counts as logit 0 there, which is what a `logit` store means by a score of 0 and by its background.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labeler.base.errors import InputError
from labeler.base.plain_tensors import load_plain
from labeler.config import LabelerConfig
from labeler.run import default_shard_size, make_task, stored_keys
from labeler.sources.class_names import name_classes
from labeler.sources.create_decoder import create_decoder
from labeler.sources.decoder import DecodeSettings, teacher_region
from labeler.sources.images import BadImage, ImageSet, find_images, refuse_other_images
from labeler.store.foreign_store import remember_written
from labeler.store.plan import Plan, StoreMeta, load_plan
from labeler.store.shard_file import ShardRows
from labeler.store.shard_writer import begin_store, committed_shards, finish_store, store_classes, write_shard
from labeler.teacher.teacher_config import TeacherConfig
from labeler.worker import ShardTask, load_batches

log = logging.getLogger("labeler")

MAX_FILE_BYTES = 16 << 20  # a map of 5 classes on a 400×400 grid; the real ones have 18×18
MAX_PICKLE = 64 << 10  # of which a map's one tensor needs 200 bytes
CHANCE = 5.0  # agreement with the true classes below this many times chance is told


@dataclass(frozen=True)
class ImportSummary:
    """agreement: share of images whose map's largest class is their folder's, None where the folders tell no class."""

    store: str
    rows: int
    quarantined: int
    palette: int
    grid: tuple[int, int]
    agreement: float | None

    def text(self) -> str:
        known = "" if self.agreement is None else f", agreement with the folders' classes {self.agreement:.1%}"
        return (
            f"{self.rows:,} maps of {self.grid[0]}×{self.grid[1]} cells, palette {self.palette}{known}; "
            f"{self.quarantined} in the quarantine\n{self.store}"
        )


def import_token_label_files(
    files: str | Path,
    images: str | Path,
    store: str | Path,
    *,
    num_classes: int = 1000,
    class_names: str | None = None,
    view: str = "full",
    crop_pct: float = 1.0,
    progress: bool = True,
) -> ImportSummary:
    """Import the `.pt` maps below `files` for the images below `images`; resumes by itself.

    An image `a/b.c.JPEG` takes `a/b.c.pt`, or `a/b.pt` as the reference names it, where no other image does.
    view, crop_pct   which part of the image the maps cover: "full", which is how TokenLabeling's training reads them,
                     or "center" with the crop of the teacher that made them, which is what they do cover

    Raises InputError, and LabelingError where writing fails. An image without a good map goes to the quarantine.
    """
    found, path, maps = find_images(images), Path(store), Path(files)
    if not maps.is_dir():
        raise InputError(f"{str(maps)!r} is not a folder of .pt maps")
    begun = load_plan(path)
    if begun is not None:
        refuse_other_images(found, begun.meta.dataset_fingerprint, stored_keys(path), path)
    sources = match_files(found, maps)
    grid, palette = _survey(sources, num_classes, progress)
    plan = begin_store(path, _make_plan(found, grid, palette, num_classes, class_names, view, crop_pct))
    markers = committed_shards(path, plan)
    decoder_config = LabelerConfig(TeacherConfig("import"), orientation="ignore")
    # Decoded in full although only the size is kept: training trusts that every image of a store can be.
    decode = create_decoder("auto", DecodeSettings(size=8, orientation="ignore", threads=2))
    todo = [shard for shard in range(plan.meta.shards) if shard not in markers]
    for shard in _bar(todo, "import", progress):
        task = make_task(plan, found, shard)
        _import_shard(task, sources, found.root, path, plan, decoder_config, decode)
    markers_now = finish_store(path, plan)
    if not markers:  # the shards that were there may be another's
        remember_written(path)
    known = sum(m.stats["known"] for m in markers_now)
    agree = sum(m.stats["agree"] for m in markers_now)
    if known >= 20 and agree / known < CHANCE / num_classes:
        log.warning(
            "only %.1f %% of the maps name their image's own class: are these the maps of these images, and the class "
            "ids in the order of the folders?",
            100 * agree / known,
        )
    return ImportSummary(
        str(path),
        sum(m.rows for m in markers_now),
        sum(len(m.quarantine) for m in markers_now),
        palette,
        grid,
        agree / known if known else None,
    )


def match_files(images: ImageSet, maps: Path) -> dict[str, Path | str]:
    """Image key -> its map's file, or why there is none."""
    short = Counter(_cut_at_first_dot(key) for key in images.keys)
    found: dict[str, Path | str] = {}
    for key in images.keys:
        exact, cut = maps / f"{key.rpartition('.')[0]}.pt", _cut_at_first_dot(key)
        if exact.is_file():
            found[key] = exact
        elif (maps / f"{cut}.pt").is_file():
            unique = short[cut] == 1
            found[key] = maps / f"{cut}.pt" if unique else f"{cut}.pt could be the map of {short[cut]} images"
        else:
            found[key] = "no map file"
    if not any(isinstance(value, Path) for value in found.values()):
        raise InputError(
            f"no map below {str(maps)!r} belongs to an image",
            expected=f"for example {maps / images.keys[0].rpartition('.')[0]!s}.pt",
        )
    return found


def _cut_at_first_dot(key: str) -> str:
    folder, _, name = key.rpartition("/")
    stem = name.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def read_map(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(logits float16 [5, H, W], class ids int64 [5, H, W]). Raises BadImage; runs no code of the file."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadImage(f"{path.name} is larger than any label map ({path.stat().st_size:,} bytes)")
        tensor = load_plain(path, max_pickle=MAX_PICKLE)
    except BadImage:
        raise
    except Exception as error:  # a damaged file makes torch raise many types
        told = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise BadImage(f"{path.name} cannot be read: {told}") from None
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4 or tensor.shape[0] != 2 or tensor.shape[1] > 64:
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise BadImage(f"{path.name} holds {shape}, expected a tensor [2, 5, H, W]")
    if tensor.numel() * 2 > MAX_FILE_BYTES:
        raise BadImage(f"{path.name} holds {tuple(tensor.shape)}, more than any label map")
    values, ids = tensor.half().numpy(), tensor[1].double().numpy()
    if not np.isfinite(values[0]).all():
        raise BadImage(f"{path.name} has logits that are not finite")
    if not ((ids >= 0) & (ids < num_classes) & (ids == np.floor(ids))).all():
        raise BadImage(f"{path.name}: its second half is no class ids below {num_classes}; are values and ids swapped?")
    ids = ids.astype(np.int64)
    ordered = np.sort(ids, axis=0)
    if (ordered[1:] == ordered[:-1]).any():
        raise BadImage(f"{path.name} names a class twice in one cell")
    return values[0], ids


def to_palette(values: np.ndarray, ids: np.ndarray, palette: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(class ids int64 [P], −1 unused; scores float16 [P, H, W]) of one map, the class with the largest share first."""
    weights = np.exp(values.astype(np.float64))
    share = weights / (weights.sum(0) + num_classes - len(values))
    classes, place = np.unique(ids, return_inverse=True)
    place = place.reshape(ids.shape)
    total = np.bincount(place.ravel(), share.ravel(), len(classes))
    order = np.argsort(-total, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    scores = np.zeros((palette, *values.shape[1:]), np.float16)
    np.put_along_axis(scores, rank[place], values, axis=0)
    return np.pad(classes[order], (0, palette - len(classes)), constant_values=-1), scores


def _survey(sources: dict[str, Path | str], num_classes: int, progress: bool) -> tuple[tuple[int, int], int]:
    """(grid of the maps, most classes in one map). The palette must hold every class that any map names."""
    grids: Counter[tuple[int, int]] = Counter()
    palette = 1
    paths = [path for path in sources.values() if isinstance(path, Path)]
    problem = ""
    for path in _bar(paths, "survey", progress):
        try:
            _, ids = read_map(path, num_classes)
        except BadImage as error:
            problem = str(error)
            continue
        grids[ids.shape[1], ids.shape[2]] += 1
        palette = max(palette, len(np.unique(ids)))
    if not grids:
        raise InputError("no label map can be read", got=problem)
    return grids.most_common(1)[0][0], palette


def _make_plan(
    images: ImageSet,
    grid: tuple[int, int],
    palette: int,
    num_classes: int,
    names_file: str | None,
    view: str,
    crop: float,
) -> Plan:
    names, folders = name_classes(images.keys, num_classes, names_file)
    size = default_shard_size(len(images))
    meta = StoreMeta(
        num_classes=num_classes,
        class_names=names,
        palette=palette,
        grid=grid,
        score_kind="logit",
        precision="float16",
        orientation="ignore",
        teacher={"name": "imported TokenLabeling maps", "view": view, "crop_pct": crop},
        dataset_fingerprint=images.fingerprint,
        num_images=len(images),
        shards=math.ceil(len(images) / size),
    )
    key_bytes = max(len(key.encode()) for key in images.keys)
    return Plan(meta, {"from_list": False}, size, key_bytes, class_folders=dict(folders))


def _import_shard(
    task: ShardTask,
    sources: dict[str, Path | str],
    root: Path,
    store: Path,
    plan: Plan,
    config: LabelerConfig,
    decode: Any,
) -> None:
    meta, teacher = plan.meta, plan.meta.teacher
    failures: dict[int, str] = {}
    rows: list[tuple[Any, ...]] = []
    for batch in load_batches(task, root, config, decode):
        failures |= batch.failures
        for place, position in enumerate(batch.positions):
            source = sources[task.keys[position]]
            try:
                if not isinstance(source, Path):
                    raise BadImage(source)
                values, ids = read_map(source, meta.num_classes)
                if values.shape[1:] != tuple(meta.grid):
                    raise BadImage(f"{source.name} has a grid of {values.shape[1:]}, the others {tuple(meta.grid)}")
            except BadImage as error:
                failures[position] = str(error)
                continue
            size = batch.decoded.sizes[place]
            region = teacher_region(int(size[0]), int(size[1]), teacher["view"], teacher["crop_pct"])
            classes, scores = to_palette(values, ids, meta.palette, meta.num_classes)
            rows.append((position, classes, scores, region, size, batch.digests[place]))
    targets = np.array([task.targets[row[0]] for row in rows], np.int32)
    classes = np.array([row[1] for row in rows], np.int64).reshape(-1, meta.palette)
    shard_rows = ShardRows(
        scores=np.array([row[2] for row in rows], np.float16).reshape(-1, meta.palette, *meta.grid),
        background=None,
        classes=store_classes(classes, meta.num_classes),
        region=np.array([row[3] for row in rows], np.float32).reshape(-1, 4),
        image_size=np.array([row[4] for row in rows], np.uint32).reshape(-1, 2),
        target=targets,
        image_digest=np.array([row[5] for row in rows], np.uint64),
        keys=tuple(task.keys[row[0]] for row in rows),
    )
    quarantine = [{"key": task.keys[i], "reason": failures[i]} for i in sorted(failures)]
    stats = {"known": int((targets >= 0).sum()), "agree": int((classes[:, 0] == targets).sum())}
    write_shard(store, plan, task.shard, shard_rows, quarantine, stats, task.keys)


def _bar(items: list, name: str, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=name, disable=not shown)
