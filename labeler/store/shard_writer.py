"""Writes a store: begin it, write its shards in any order and from any process, finish it.

The bytes of a shard come from `hdf5/build_shard.py`; `publish_shard` of `shard_markers.py` puts them on the disk.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from labeler.base.errors import InputError, IntegrityError, LabelingError
from labeler.base.whole_files import replace_file, sync_folder
from labeler.store.hdf5 import VIEW_FILE
from labeler.store.hdf5.build_shard import build_shard, build_view
from labeler.store.parts.compare_plans import refuse_other_settings
from labeler.store.parts.find_parts import part_folders, part_name
from labeler.store.parts.join_parts import joined_plan
from labeler.store.parts.open_part import Part
from labeler.store.plan import HEAD_FILE, Plan, load_plan
from labeler.store.row_schema import ShardRows
from labeler.store.shard_markers import Marker, check_file, publish_shard, read_marker, shard_stem, sweep

QUARANTINE_FILE = "quarantine.jsonl"
CANNOT_WRITE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})

log = logging.getLogger("labeler")


def begin_store(store: Path, plan: Plan) -> Plan:
    """Creates a store's folder and plan, or checks that an existing store has the same settings and images.

    Args:
        store: The store's folder.
        plan: The plan of this run.

    Returns:
        The plan in the store.

    Raises:
        MismatchError: The store was begun with other settings or images.
        InputError: The folder cannot be written, or contains something else.
        LabelingError: The disk is full or fails.
    """
    try:
        existing = open_folder(store, keep_head="head" in plan.meta.teacher)
        if existing is None:
            if plan.save(store):
                return plan
            existing = load_plan(store)
            assert existing is not None
    except OSError as error:
        raise folder_error(store, error) from None
    refuse_other_settings(store, existing, plan)
    return existing


def open_folder(store: Path, keep_head: bool) -> Plan | None:
    """Creates a store's folder if needed.

    Args:
        store: The store's folder.
        keep_head: Whether a linear head may be in it before the plan.

    Returns:
        The plan in it; None if there is none yet.

    Raises:
        InputError: The folder cannot be written, or contains something else.
        LabelingError: The disk is full or fails.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        plan = load_plan(store)
        names = sorted(path.name for path in store.iterdir())
    except OSError as error:
        raise folder_error(store, error) from None
    expected = HEAD_FILE if keep_head else None
    foreign = [name for name in names if not name.startswith(".tmp-") and name != expected]
    if plan is None and foreign:
        raise InputError(
            f"{str(store)!r} is not empty and not a label store",
            got=", ".join(foreign[:3]),
            remedy="Choose an empty or a new folder.",
        )
    return plan


def write_shard(
    store: Path,
    plan: Plan,
    shard: int,
    rows: ShardRows,
    quarantine: list[dict[str, str]],
    stats: Mapping[str, float],
    keys: tuple[str, ...],
) -> bool:
    """Commits one shard.

    Args:
        store: The store's folder.
        plan: The store's plan.
        shard: Number of the shard.
        rows: Its rows.
        quarantine: {"key", "reason"} of each image of its slice that has no row.
        stats: Sums over its rows, see `Marker`.
        keys: Keys of its slice.

    Returns:
        False if another writer was first.

    Raises:
        LabelingError: The disk is full or fails. No files are left behind.
    """
    table = np.array(plan.code_values, np.float32) if plan.code_values else None
    data = build_shard(rows, plan.layout, plan.meta.attributes(shard), table)
    fields = {
        "shard": shard,
        "rows": len(rows),
        "first_key": keys[0],
        "last_key": keys[-1],
        "quarantine": quarantine,
        "stats": dict(stats),
    }
    try:
        return publish_shard(store, shard_stem(shard, plan.meta.shards), data, fields)
    except OSError as error:
        raise disk_error(store, error) from None


def folder_error(store: Path, error: OSError) -> InputError | LabelingError:
    """Returns the error to raise when a store's folder could not be created or begun."""
    if error.errno in CANNOT_WRITE:
        return InputError(f"the store {str(store)!r} cannot be written", got=error.strerror)
    return disk_error(store, error)


def disk_error(store: Path, error: OSError) -> LabelingError:
    """Returns the error to raise when writing to a store failed."""
    return LabelingError(
        f"writing to the store {str(store)!r} failed",
        got=error.strerror or str(error),
        remedy="Every committed shard is kept: free or repair the disk and run the same command again.",
    )


def committed_shards(store: Path, plan: Plan) -> dict[int, Marker]:
    """Returns shard number -> marker of all intact shards. Removes the markers of damaged ones, to label them again."""
    markers = {}
    for shard in range(plan.meta.shards):
        try:
            marker = read_marker(store, shard, plan.meta.shards)
            if marker is None:
                continue
            check_file(store, marker)
        except IntegrityError as error:
            log.warning("%s", error)
            _withdraw(store / f"{shard_stem(shard, plan.meta.shards)}.json")
            continue
        markers[shard] = marker
    return markers


def _withdraw(marker: Path) -> None:
    """Removes a marker."""
    try:
        marker.unlink(missing_ok=True)
        sync_folder(marker.parent)
    except OSError as error:
        raise disk_error(marker.parent, error) from None


def finish_store(store: Path) -> list[Marker]:
    """Writes `quarantine.jsonl` and the view over all shards, those of all parts, and removes leftover files.

    Returns:
        The markers of all shards.

    Raises:
        IntegrityError: A shard is missing or its marker is damaged.
        LabelingError: The disk is full or fails.
    """
    parts = [Part(folder, trusted=True) for folder in part_folders(store)]  # no shard is opened
    whole, lines, files = joined_plan(parts), [], []
    for number, part in enumerate(parts):
        where = {"part": number} if number else {}
        for marker in part.markers:
            lines += [{**entry, "shard": marker.shard, **where} for entry in marker.quarantine]
            files.append((os.path.join(part_name(number), marker.file), marker.rows))
    try:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        replace_file(store / QUARANTINE_FILE, text.encode())
        replace_file(store / VIEW_FILE, build_view(files, whole.layout, whole.meta.attributes()))
        sweep(store, parts[0].markers)
    except OSError as error:
        raise disk_error(store, error) from None
    if len(part_folders(store)) > len(parts):  # another run has just added one
        return finish_store(store)
    return [marker for part in parts for marker in part.markers]
