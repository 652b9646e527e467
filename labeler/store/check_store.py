"""Checks a store bit by bit, and its images. For a check against its teacher see `labeler.relabel`.

Legend: n rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labeler.base.errors import InputError, IntegrityError, TokenLabelError
from labeler.remote.failures import NotThere
from labeler.remote.local_copy import LocalCopy
from labeler.remote.remote_files import in_parallel
from labeler.sources.image_source import BadImage, image_digest, refuse_other_images
from labeler.sources.open_source import open_images, open_source
from labeler.store.foreign_store import open_folder, refuse_hostile, view_rows
from labeler.store.hdf5 import VIEW_FILE
from labeler.store.hdf5.read_shard import ShardReader, file_rows
from labeler.store.plan import HEAD_FILE, Plan, load_plan
from labeler.store.row_checks import shard_problems, value_problems
from labeler.store.shard_markers import check_file, check_head, read_marker
from labeler.store.shard_writer import QUARANTINE_FILE

MOST_PROBLEMS = 100


@dataclass(frozen=True)
class Verification:
    """What was checked, and the problems.

    Attributes:
        store: The store's folder.
        shards: Shards of the plan.
        rows: Rows that were checked.
        quarantined: Images in the quarantine.
        bytes: Size of the store.
        images_checked: Image files that were compared with their digests.
        relabeled: Rows that were labeled again.
        relabel_kl: Mean KL(teacher ‖ store) of these rows, in nats; None if there are none.
        stored_kl: The same of all rows, as it was when they were labeled.
        problems: One line each.
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
        """Returns the summary in one line."""
        parts = [
            f"{self.shards} shards, {self.rows:,} rows, {self.bytes:,} bytes, {self.quarantined} in the quarantine"
        ]
        if self.images_checked:
            parts.append(f"{self.images_checked:,} image files compared")
        if self.relabel_kl is not None:
            parts.append(
                f"{self.relabeled} rows labeled again: KL {self.relabel_kl:.4f} (stored with {self.stored_kl:.4f})"
            )
        parts.append(f"{len(self.problems)} problems" if self.problems else "no problems")
        return "; ".join(parts)


def check_store(store: str | Path, *, trusted: bool = False, progress: bool = False) -> Verification:
    """Checks a store's plan, markers, digests, layout, rows and view.

    Args:
        store: The store's folder, or its URL: then all of it is fetched into the cache.
        trusted: Skip the check in a child process that comes first; for your own stores, or those of people you trust.
        progress: Show a progress bar.

    Returns:
        What was checked, and all problems.

    Raises:
        InputError: There is no store.
        RemoteError: The service of its URL does not answer.
    """
    problems: list[str] = []
    try:
        path, remote = open_folder(store)
        plan = None if remote is None else load_plan(path)
        failed = {} if remote is None or plan is None else _fetch(remote, plan)
        own = trusted or refuse_hostile(path)
    except IntegrityError as error:
        return Verification(str(store), 0, 0, 0, 0, 0, 0, None, 0.0, (str(error),))
    plan = plan or load_plan(path)
    if plan is None:
        raise InputError(f"{str(store)!r} is not a label store", got="no plan.json", remedy="Give a store's folder.")
    rows = quarantined = 0
    stored_kl = 0.0
    for shard in _progress(range(plan.meta.shards), "verify", progress):
        try:
            marker = read_marker(path, shard, plan.meta.shards)
            if marker is None:
                again = "run the labeling command again" if remote is None else "push the store again"
                problems.append(f"shard {shard} is missing: {again}")
                continue
            if shard in failed:
                raise failed[shard]
            check_file(path, marker)
            reader = ShardReader(path / marker.file, plan.layout, marker.rows)
            values = reader.read(np.arange(marker.rows))
            bad = shard_problems(plan, shard, reader, marker.quarantine) + value_problems(plan, values)
            problems += [f"{marker.file}: {problem}" for problem in bad]
        except IntegrityError as error:
            problems.append(str(error))
            continue
        rows, quarantined = rows + marker.rows, quarantined + len(marker.quarantine)
        stored_kl += marker.stats.get("kl", 0.0)
    problems += _head_problems(path, plan)
    if not problems:
        problems += _view_problems(path, rows, quarantined, file_rows if own else view_rows)
    size = sum(file.stat().st_size for file in path.iterdir())
    return Verification(
        str(store), plan.meta.shards, rows, quarantined, size, 0, 0, None, stored_kl / max(1, rows), tuple(problems)
    )


def _fetch(remote: LocalCopy, plan: Plan) -> dict[int, IntegrityError]:
    """Fetches all of a remote store that there is; returns what is wrong with shards that cannot be fetched."""
    failed = {}

    def fetch(shard: int) -> None:
        marker = read_marker(remote.path, shard, plan.meta.shards)
        try:
            if marker is not None:
                remote.fetch(marker.file, marker.size, marker.sha256)
        except IntegrityError as error:
            failed[shard] = error

    in_parallel(fetch, range(plan.meta.shards))
    head = [HEAD_FILE] if plan.head is not None else []
    for name in (VIEW_FILE, QUARANTINE_FILE, *head):
        with suppress(NotThere):
            remote.fetch_anew(name)
    return failed


def check_images(
    store: str | Path,
    plan: Plan,
    keys: Sequence[str],
    digests: Sequence[int],
    quarantined: Sequence[str],
    images: str | Path,
    progress: bool = False,
) -> tuple[int, tuple[str, ...]]:
    """Compares every image file with the digest that was stored when it was labeled.

    Args:
        store: The store's folder, for messages.
        plan: The store's plan.
        keys: Keys of all rows.
        digests: xxh3-64 of each row's image file.
        quarantined: Keys of the images that could not be labeled.
        images: The images that were labeled, as for `open_source`.
        progress: Show a progress bar.

    Returns:
        (number of images compared, problems in one line each).
    """
    if not plan.settings.get("from_list"):  # a list may name files that a listing of the folder leaves out
        try:
            refuse_other_images(open_source(images), plan.meta.dataset_fingerprint, (*keys, *quarantined), store)
        except TokenLabelError as error:
            return 0, (str(error),)
    compared, problems, source = 0, [], open_images(images, keys)
    for key, digest in _progress(list(zip(keys, digests, strict=True)), "images", progress):
        compared += 1
        try:
            if image_digest(source.read(compared - 1)) != digest:
                problems.append(f"{key!r} is not the image that was labeled: its bytes have changed")
        except BadImage as error:
            problems.append(f"{key!r} {error}")
        if len(problems) >= MOST_PROBLEMS:
            problems.append("… and possibly more")
            break
    return compared, tuple(problems)


def _head_problems(store: Path, plan: Plan) -> list[str]:
    """Checks that the linear head that the plan names, if any, is there and whole."""
    try:
        check_head(store, plan)
    except IntegrityError as error:
        return [str(error)]
    return []


def _view_problems(store: Path, rows: int, quarantined: int, count: Callable[[Path, str], int]) -> list[str]:
    """Checks that the view and the quarantine are complete."""
    problems = []
    try:
        visible = count(store, "scores")
        if visible != rows:
            problems.append(f"{VIEW_FILE} shows {visible} rows of {rows}: run the labeling command again")
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


def _progress(items: Any, name: str, show_progress: bool) -> Any:
    """Wraps items in a progress bar."""
    from tqdm import tqdm

    return tqdm(items, desc=name, disable=not show_progress)
