"""Checks a store bit by bit, and its images. For a check against its teacher see `labeler.checks.relabel`.

Legend: n rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from labeler.base.errors import InputError, IntegrityError, MismatchError, TokenLabelError
from labeler.remote.failures import NotThere
from labeler.remote.in_parallel import in_parallel
from labeler.remote.local_copy import LocalCopy
from labeler.remote.urls import is_url, path_or_url
from labeler.sources.image_source import BadImage, image_digest
from labeler.sources.open_source import open_images, open_source
from labeler.store.foreign_store import open_folder, refuse_hostile_part, view_rows
from labeler.store.hdf5 import VIEW_FILE
from labeler.store.hdf5.read_shard import ShardReader, file_rows
from labeler.store.parts.find_parts import part_folders, part_name
from labeler.store.parts.join_parts import joined_plan, refuse_shared_keys
from labeler.store.parts.open_part import Part, further_urls, open_parts
from labeler.store.parts.same_images import LabeledImages, refuse_other_images
from labeler.store.plan import HEAD_FILE, Plan, load_plan
from labeler.store.row_checks import shard_problems, value_problems
from labeler.store.shard_markers import check_file, check_head, read_marker
from labeler.store.shard_writer import QUARANTINE_FILE

MOST_PROBLEMS = 100
View = tuple[Path, Callable[[Path, str], int]]  # the folder of a view, and what counts the rows that it shows


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
    """Checks the plan, markers, digests, layout, rows and view of a store and of its parts.

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
    try:
        places: list[Path | str] = [store, *_further_places(store)]
    except IntegrityError as error:
        return _refused(store, error)
    results = [_check_part(store, trusted, progress), *(_check_further(one, trusted, progress) for one in places[1:])]
    whole, views = joined([one for one, _ in results]), [view for _, view in results]
    if whole.problems:
        return whole
    problems = _view_problems(*views[0], whole.rows, whole.quarantined)
    for place, (one, _), view in zip(places[1:], results[1:], views[1:], strict=True):
        name = Path(str(place)).name
        problems += [f"{name}: {problem}" for problem in _view_problems(*view, one.rows, one.quarantined)]
    if len(places) > 1:
        problems += _problems_between(store)
    return replace(whole, problems=(*_lost_parts(store, len(places)), *problems))


def _further_places(store: str | Path) -> list[Path | str]:
    """Returns the folders or URLs of the parts below a store's own. Raises IntegrityError for a link."""
    if isinstance(store, Path) or not is_url(store):
        return [*part_folders(Path(store))[1:]]
    return [*further_urls(store)]


def _refused(place: str | Path, error: TokenLabelError) -> Verification:
    """Returns the result for a part that cannot be read at all."""
    return Verification(str(place), 0, 0, 0, 0, 0, 0, None, 0.0, (str(error),))


def _check_further(place: str | Path, trusted: bool, progress: bool) -> tuple[Verification, View]:
    """Checks a part below a store's own folder."""
    try:
        return _check_part(place, trusted, progress)
    except (InputError, IntegrityError) as error:
        return _refused(place, error), (Path(), file_rows)


def _check_part(store: str | Path, trusted: bool, progress: bool) -> tuple[Verification, View]:
    """Checks one folder, without its parts and its view; returns what was found, and how to look at its view."""
    problems: list[str] = []
    try:
        path, remote = open_folder(store)
        plan = None if remote is None else load_plan(path)
        failed = {} if remote is None or plan is None else _fetch(remote, plan)
        own = trusted or refuse_hostile_part(path)
    except IntegrityError as error:
        return _refused(store, error), (Path(), file_rows)
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
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    found = Verification(
        str(store), plan.meta.shards, rows, quarantined, size, 0, 0, None, stored_kl / max(1, rows), tuple(problems)
    )
    return found, (path, file_rows if own else view_rows)


def joined(results: Sequence[Verification]) -> Verification:
    """Returns what was checked of several stores or parts together."""
    rows = sum(one.rows for one in results)
    return replace(
        results[0],
        shards=sum(one.shards for one in results),
        rows=rows,
        quarantined=sum(one.quarantined for one in results),
        bytes=sum(one.bytes for one in results),
        stored_kl=sum(one.stored_kl * one.rows for one in results) / max(1, rows),
        problems=tuple(problem for one in results for problem in one.problems),
    )


def _lost_parts(store: str | Path, parts: int) -> list[str]:
    """Checks that no folder has a number beyond the last part: a part, or its plan, would be gone."""
    numbers = [path.name.removeprefix("part-") for path in Path(store).glob("part-*")]
    beyond = sorted(number for number in numbers if number.isdecimal() and int(number) >= parts)
    return [f"part-{beyond[0]} is there, but not {part_name(parts)}/plan.json"] if beyond else []


def _problems_between(store: str | Path) -> list[str]:
    """Checks that the parts of a store have the same settings, and no image twice."""
    try:
        parts = open_parts(path_or_url(store), trusted=True)  # all of them have been checked
        joined_plan(parts)
        refuse_shared_keys(parts, [_keys_of(part) for part in parts])
    except (MismatchError, IntegrityError) as error:
        return [str(error)]
    return []


def _keys_of(part: Part) -> list[str]:
    return [key for marker in part.markers for key in part.open_shard(marker).keys]


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
    parts: Sequence[LabeledImages],
    images: str | Path,
    from_list: bool,
    progress: bool = False,
) -> tuple[int, tuple[str, ...]]:
    """Compares every image file with the digest that was stored when it was labeled.

    Args:
        store: The store's folder, for messages.
        parts: The images of each part, with their digests.
        images: The images that were labeled, as for `open_source`.
        from_list: Whether a list named them; then the folder may have others that were not labeled.
        progress: Show a progress bar.

    Returns:
        (number of images compared, problems in one line each).
    """
    digests = {key: digest for part in parts for key, digest in (part.digests or {}).items()}
    keys = sorted(digests)
    if from_list:
        source = open_images(images, keys)
    else:
        try:
            everything = open_source(images)
            refuse_other_images(everything, parts, store)
        except TokenLabelError as error:
            return 0, (str(error),)
        source = everything.of_keys(keys)
    compared, problems = 0, []
    for key in _progress(keys, "images", progress):
        compared += 1
        try:
            if image_digest(source.read(compared - 1)) != digests[key]:
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


def _view_problems(store: Path, count: Callable[[Path, str], int], rows: int, quarantined: int) -> list[str]:
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
