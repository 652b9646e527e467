"""Checking a store: every bit of it, and its images. Its teacher is another matter, see `labeler.relabel`.

Legend: n rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labeler.base.errors import InputError, IntegrityError, TokenLabelError
from labeler.base.whole_files import check_file, read_marker
from labeler.sources.images import BadImage, find_images, image_digest, image_root, read_image, refuse_other_images
from labeler.store.foreign_store import refuse_hostile, view_rows
from labeler.store.plan import Plan, load_plan
from labeler.store.row_checks import shard_problems, value_problems
from labeler.store.shard_file import VIEW_FILE, ShardReader, file_rows
from labeler.store.shard_writer import QUARANTINE_FILE

MOST_PROBLEMS = 100


@dataclass(frozen=True)
class Verification:
    """What was checked, and every problem found in one line each.

    stored_kl: mean KL(teacher ‖ store) in nats of all rows, as it was when they were labeled; relabel_kl: the same of
    the rows that were labeled again.
    """

    store: str
    shards: int
    rows: int
    quarantined: int
    bytes: int
    images_checked: int
    relabeled: int
    relabel_kl: float | None
    stored_kl: float
    problems: tuple[str, ...]

    def text(self) -> str:
        parts = [
            f"{self.shards} shards, {self.rows:,} rows, {self.bytes:,} bytes, {self.quarantined} in the quarantine"
        ]
        if self.images_checked:
            parts.append(f"{self.images_checked:,} image files compared")
        if self.relabel_kl is not None:
            parts.append(
                f"{self.relabeled} rows labeled again: KL {self.relabel_kl:.4f} (stored with {self.stored_kl:.4f})"
            )
        parts.append(f"{len(self.problems)} problems" if self.problems else "all good")
        return "; ".join(parts)


def check_store(store: str | Path, *, trusted: bool = False, progress: bool = False) -> Verification:
    """Check a store's plan, markers, digests, layout, rows and view.

    trusted  no check in a child process first: the store is your own, or you trust who made it
    Raises InputError where there is no store at all; everything else is a problem in the result.
    """
    path, problems = Path(store), []
    try:
        own = trusted or refuse_hostile(path)
    except IntegrityError as error:
        return Verification(str(path), 0, 0, 0, 0, 0, 0, None, 0.0, (str(error),))
    plan = load_plan(path)
    if plan is None:
        raise InputError(f"{str(path)!r} is not a label store", got="no plan.json", remedy="Give a store's folder.")
    rows = quarantined = 0
    stored_kl = 0.0
    for shard in _progress(range(plan.meta.shards), "verify", progress):
        try:
            marker = read_marker(path, shard, plan.meta.shards)
            if marker is None:
                problems.append(f"shard {shard} is missing: run the labeling command again")
                continue
            check_file(path, marker)
            reader = ShardReader(path / marker.file, plan.layout, marker.rows)
            found = reader.read(np.arange(marker.rows))
            bad = shard_problems(plan, shard, reader, marker.quarantine) + value_problems(plan, found)
            problems += [f"{marker.file}: {problem}" for problem in bad]
        except IntegrityError as error:
            problems.append(str(error))
            continue
        rows, quarantined = rows + marker.rows, quarantined + len(marker.quarantine)
        stored_kl += marker.stats.get("kl", 0.0)
    if not problems:
        problems += _view_problems(path, rows, quarantined, file_rows if own else view_rows)
    size = sum(file.stat().st_size for file in path.iterdir())
    return Verification(
        str(path), plan.meta.shards, rows, quarantined, size, 0, 0, None, stored_kl / max(1, rows), tuple(problems)
    )


def check_images(
    store: Path,
    plan: Plan,
    keys: Sequence[str],
    digests: Sequence[int],
    quarantined: Sequence[str],
    images: str | Path,
    progress: bool = False,
) -> tuple[int, tuple[str, ...]]:
    """Compare every image file with the digest that was stored when it was labeled: images compared, and problems.

    Args:
        store: The store's folder, for messages.
        plan: Its plan.
        keys: Of all rows.
        digests: xxh3-64 of each row's image file.
        quarantined: Keys of the images that could not be labeled.
        images: The image root that was labeled.
    """
    root = image_root(images)
    if not plan.settings.get("from_list"):  # a list may name files that a folder's listing leaves out
        try:
            refuse_other_images(find_images(root), plan.meta.dataset_fingerprint, (*keys, *quarantined), store)
        except TokenLabelError as error:
            return 0, (str(error),)
    compared, problems = 0, []
    for key, digest in _progress(list(zip(keys, digests, strict=True)), "images", progress):
        compared += 1
        try:
            if image_digest(read_image(root, key)) != digest:
                problems.append(f"{key!r} is not the image that was labeled: its bytes have changed")
        except BadImage as error:
            problems.append(f"{key!r} {error}")
        if len(problems) >= MOST_PROBLEMS:
            problems.append("… and perhaps more")
            break
    return compared, tuple(problems)


def _view_problems(store: Path, rows: int, quarantined: int, count: Callable[[Path, str], int]) -> list[str]:
    problems = []
    try:
        found = count(store, "scores")
        if found != rows:
            problems.append(f"{VIEW_FILE} shows {found} rows of {rows}: run the labeling command again")
        lines = len((store / QUARANTINE_FILE).read_bytes().splitlines())
        if lines != quarantined:
            problems.append(
                f"{QUARANTINE_FILE} has {lines} lines for {quarantined} images: run the labeling command again"
            )
    except IntegrityError as error:
        problems.append(str(error))
    except (OSError, KeyError) as error:
        problems.append(f"the store is not finished ({error}): run the labeling command again")
    return problems


def _progress(items: Any, name: str, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=name, disable=not shown)
