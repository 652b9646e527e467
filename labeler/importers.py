"""Imports TokenLabeling and ReLabel maps into a label store of kind `logit`, bit for bit.

Legend: N images; C classes; P palette size; H×W map grid.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labeler.base.errors import InputError
from labeler.config import LabelerConfig
from labeler.make_plan import default_shard_size
from labeler.published_maps import match_files, read_map, to_palette
from labeler.run import make_task
from labeler.sources.class_names import name_classes, true_classes
from labeler.sources.decoding.create_decoder import create_decoder
from labeler.sources.decoding.decoder import Decoder, DecodeSettings, teacher_region
from labeler.sources.image_source import BadImage, ImageSource
from labeler.sources.open_source import open_source
from labeler.store.foreign_store import remember_written
from labeler.store.parts.extend_store import labeled_images
from labeler.store.parts.same_images import refuse_other_images
from labeler.store.plan import Plan, load_plan, plan_of
from labeler.store.row_schema import ShardRows, store_classes
from labeler.store.shard_writer import begin_store, committed_shards, finish_store, write_shard
from labeler.worker import ShardTask, load_batches

log = logging.getLogger("labeler")

CHANCE = 5.0  # warn if agreement with the true classes is below this many times chance


@dataclass(frozen=True)
class ImportSummary:
    """The result of an import.

    Attributes:
        store: The store's folder.
        rows: Maps that were imported.
        quarantined: Images without a good map.
        palette: P.
        grid: H, W.
        agreement: Share of images whose map's largest class is their folder's; None if the folders are not classes.
    """

    store: str
    rows: int
    quarantined: int
    palette: int
    grid: tuple[int, int]
    agreement: float | None

    def text(self) -> str:
        """Returns the summary as text."""
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
    """Imports `.pt` maps into a label store; resumes automatically. Images without a good map are quarantined.

    The map of an image `a/b.c.JPEG` is `a/b.c.pt`, or `a/b.pt`, as the reference names it, if no other image has that.

    Args:
        files: Folder of `.pt` maps.
        images: Folder of images.
        store: Folder of the label store; created if needed.
        num_classes: C.
        class_names: File of class names, one per line.
        view: The part of the image that the maps cover: "full", as TokenLabeling's training reads them, or "center",
            the crop of the teacher that made them, which they really cover.
        crop_pct: Share of the shorter side of that crop.
        progress: Show progress bars.

    Returns:
        What was imported.

    Raises:
        InputError: The maps or images cannot be used.
        MismatchError: The store was begun with other images or settings.
        LabelingError: The disk is full or fails.
    """
    source, path, maps = open_source(images, progress=progress), Path(store), Path(files)
    if not maps.is_dir():
        raise InputError(f"{str(maps)!r} is not a folder of .pt maps")
    begun = load_plan(path)
    if begun is not None:
        refuse_other_images(source, labeled_images([path]), path)
    sources = match_files(source, maps)
    grid, palette = _survey(sources, num_classes, progress)
    plan = begin_store(path, _make_plan(source, grid, palette, num_classes, class_names, view, crop_pct))
    markers = committed_shards(path, plan)
    targets = true_classes(source, plan.class_folders, num_classes)
    # Decoded in full although only the size is kept: training relies on it that every image of a store can be decoded.
    decode = create_decoder("auto", DecodeSettings(size=8, orientation="ignore", threads=2))
    todo = [shard for shard in range(plan.meta.shards) if shard not in markers]
    for shard in _bar(todo, "import", progress):
        _import_shard(make_task(plan, source, targets, shard), sources, path, plan, decode)
    markers_now = finish_store(path)
    if not markers:  # existing shards may come from elsewhere
        remember_written(path)
    known = sum(m.stats["known"] for m in markers_now)
    agree = sum(m.stats["agree"] for m in markers_now)
    if known >= 20 and agree / known < CHANCE / num_classes:
        log.warning(
            "only %.1f %% of the maps have their image's class as the largest: do the maps belong to these images, and "
            "are class ids in the order of the folders?",
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


def _survey(sources: dict[str, Path | str], num_classes: int, progress: bool) -> tuple[tuple[int, int], int]:
    """Returns (grid of the maps, most classes in one map); the palette must have room for all classes of a map."""
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
    images: ImageSource,
    grid: tuple[int, int],
    palette: int,
    num_classes: int,
    names_file: str | None,
    view: str,
    crop: float,
) -> Plan:
    """Returns the plan of an import."""
    names, folders = name_classes(images, num_classes, names_file)
    return plan_of(
        images,
        folders,
        {"from_list": False},
        default_shard_size(len(images)),
        num_classes=num_classes,
        class_names=names,
        palette=palette,
        grid=grid,
        score_kind="logit",
        precision="float16",
        orientation="ignore",
        teacher={"name": "imported TokenLabeling maps", "view": view, "crop_pct": crop},
    )


def _import_shard(
    task: ShardTask,
    sources: dict[str, Path | str],
    store: Path,
    plan: Plan,
    decode: Decoder,
) -> None:
    """Imports and commits one shard."""
    meta, teacher = plan.meta, plan.meta.teacher
    failures: dict[int, str] = {}
    parts: list[ShardRows] = []
    agree = 0
    limits = LabelerConfig.batch_size, LabelerConfig.min_side, LabelerConfig.max_pixels  # their defaults
    for batch in load_batches(task, decode, *limits):
        failures |= batch.failures
        for index, position in enumerate(batch.positions):
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
            size = batch.decoded.sizes[index]
            region = teacher_region(int(size[0]), int(size[1]), teacher["view"], teacher["crop_pct"])
            classes, scores = to_palette(values, ids, meta.palette, meta.num_classes)
            target = task.targets[position]
            agree += int(classes[0] == target)
            row = ShardRows(
                scores=scores[None],
                classes=store_classes(classes[None], meta.num_classes),
                region=np.array([region], np.float32),
                image_size=size[None].astype(np.uint32),
                target=np.array([target], np.int32),
                image_digest=np.array([batch.digests[index]], np.uint64),
                keys=(task.keys[position],),
            )
            parts.append(row)
    rows = ShardRows.joined(parts, plan.layout)
    quarantine = [{"key": task.keys[i], "reason": failures[i]} for i in sorted(failures)]
    stats = {"known": int((rows.target >= 0).sum()), "agree": agree}
    write_shard(store, plan, task.shard, rows, quarantine, stats, task.keys)


def _bar(items: list, name: str, show_progress: bool) -> Any:
    """Wraps items in a progress bar."""
    from tqdm import tqdm

    return tqdm(items, desc=name, disable=not show_progress)
