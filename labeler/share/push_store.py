"""`push_store`: sends a store to a URL. What is there already is left; a push that was stopped goes on.

The plan is sent first, then the shards, the view, the quarantine and the card, and the markers last of all. A store is
complete when it has all its markers, so whoever reads the remote store finds all of it, or is told that it is not
complete. A shard's name has its digest, and services show a file only when it is whole: a shard that is there under its
name, with its size, is not sent again. The parts of a store are sent before its own folder, and the plan of each last
of all: a part is there when its plan is, so a store that has grown is whole there at any moment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from labeler.base.errors import InputError, IntegrityError, MismatchError
from labeler.remote.failures import NotThere
from labeler.remote.file_systems import FileIdentity
from labeler.remote.hub import size_of
from labeler.remote.in_parallel import in_parallel
from labeler.remote.remote_files import RemoteFolder
from labeler.share.dataset_card import card_of
from labeler.share.store_files import CARD, Transfer, markers_in, remote_folder
from labeler.store.hdf5 import VIEW_FILE
from labeler.store.parts.find_parts import part_folders
from labeler.store.parts.join_parts import joined_plan
from labeler.store.parts.open_part import Part
from labeler.store.plan import HEAD_FILE, PLAN_FILE, Plan, load_plan
from labeler.store.shard_markers import Marker, check_file, check_head, marker_names
from labeler.store.shard_writer import QUARANTINE_FILE

Files = list[tuple[str, Path | bytes]]


def push_store(store: str | Path, url: str | Path, *, progress: bool = False) -> Transfer:
    """Sends a complete store to a URL or a folder.

    Args:
        store: The store's folder.
        url: Where to: hf://datasets/USER/NAME, s3://BUCKET/PATH, any URL that fsspec can write, or a folder.
        progress: Show a progress bar.

    Returns:
        What was sent.

    Raises:
        InputError: There is no store, no permission, or no driver for the URL.
        MismatchError: There is another store at the URL.
        IntegrityError: The store is not complete, or a shard is damaged.
        RemoteError: The service does not answer; the same call goes on.
    """
    started, path = time.perf_counter(), Path(store)
    places = [(folder, str(url) if folder == path else f"{url}/{folder.name}") for folder in part_folders(path)]
    parts = [_prepared(folder, place, is_part=folder != path) for folder, place in places]
    card = _card(path, url, parts)
    parts[0].steps[2].extend(card)
    files = [file for part in parts for step in part.steps for file in step]
    total = sum(size_of(source) for _, source in files)
    with tqdm(total=total, desc="push", unit="B", unit_scale=True, disable=not progress) as bar:
        for part in [*parts[1:], parts[0]]:
            for step in part.steps:
                part.remote.put_all(step, bar.update)
            part.remote.sweep(part.names)
    markers = [marker for part in parts for marker in part.markers]
    return Transfer(
        str(store), str(url), len(markers), sum(marker.rows for marker in markers), len(files), total,
        sum(part.skipped for part in parts), time.perf_counter() - started,
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """What is to be sent of one folder.

    Attributes:
        remote: Where to.
        plan: Its plan.
        markers: Its markers.
        there: The files that are there.
        steps: Files to send, one step after the other.
        skipped: Shards that are there already.
    """

    remote: RemoteFolder
    plan: Plan
    markers: list[Marker]
    there: Mapping[str, FileIdentity]
    steps: list[Files]
    skipped: int

    @property
    def names(self) -> set[str]:
        """Names of all files of the folder."""
        shards = {marker.file for marker in self.markers}
        return {PLAN_FILE, VIEW_FILE, QUARANTINE_FILE, CARD, HEAD_FILE, *marker_names(self.plan)} | shards


def _prepared(store: Path, url: str, is_part: bool) -> _Part:
    """Compares a folder with what is at its URL; raises the errors of `push_store` before anything is sent."""
    plan, markers = _local(store)
    remote = remote_folder(url)
    there = remote.files()
    present = _refuse_other_store(store, plan, remote, set(there))
    missing = [marker for marker in markers if marker.file not in there or there[marker.file].size != marker.size]
    in_parallel(lambda marker: check_file(store, marker), missing)
    begin: Files = [] if PLAN_FILE in there else [(PLAN_FILE, store / PLAN_FILE)]
    steps: list[Files] = [
        [] if is_part else begin,
        [(marker.file, store / marker.file) for marker in missing],
        [file for file in _small_files(store, plan) if not _is_there(remote, *file, there)],
        [(name, store / name) for name in marker_names(plan) if name not in present],
        begin if is_part else [],
    ]
    return _Part(remote, plan, markers, there, steps, len(markers) - len(missing))


def _local(store: Path) -> tuple[Plan, list[Marker]]:
    """Returns the plan and markers of a complete store; raises InputError or IntegrityError if there is none."""
    plan = load_plan(store)
    if plan is None:
        raise InputError(f"{str(store)!r} is not a label store", got="no plan.json", remedy="Give a store's folder.")
    markers = markers_in(store, plan)
    check_head(store, plan)
    unfinished = [name for name in (VIEW_FILE, QUARANTINE_FILE) if not (store / name).is_file()]
    if len(markers) < plan.meta.shards or unfinished:
        raise IntegrityError(
            f"the store {str(store)!r} is not complete",
            got=f"no {unfinished[0]}" if unfinished else f"{len(markers)} of {plan.meta.shards} shards",
            remedy="Run the labeling command again, then push.",
        )  # fmt: skip
    return plan, [markers[shard] for shard in sorted(markers)]


def _refuse_other_store(store: Path, plan: Plan, remote: RemoteFolder, there: set[str]) -> set[str]:
    """Compares the plan and markers that are there with the store's.

    Returns:
        The names of the markers that are there.

    Raises:
        MismatchError: They are another store's.
    """

    def same(name: str) -> bool:
        try:
            data = (store / name).read_bytes()
            known = remote.identity(name)
            return known.size == len(data) and remote.read(name, identity=known) == data
        except NotThere:
            return True

    present = {name for name in marker_names(plan) if name in there}
    names = [*([PLAN_FILE] if PLAN_FILE in there else []), *sorted(present)]
    other = [name for name, equal in zip(names, in_parallel(same, names, 16), strict=True) if not equal]
    if other:
        raise MismatchError(
            f"there is another store at {remote.url}",
            got=f"another {other[0]}" + f", and {len(other) - 1} more files that differ" * (len(other) > 1),
            expected="an empty place, or this store", remedy="Push to another URL, or delete what is there first.",
        )  # fmt: skip
    return present


def _small_files(store: Path, plan: Plan) -> Files:
    """Returns the files beside plan, shards, markers and card."""
    head = [HEAD_FILE] if plan.head is not None else []
    return [(name, store / name) for name in (QUARANTINE_FILE, VIEW_FILE, *head)]


def _card(store: Path, url: str | Path, parts: list[_Part]) -> Files:
    """Returns the card, if it is to be sent. One that somebody has written there stays."""
    root = parts[0]
    if (store / CARD).is_file():
        card: tuple[str, Path | bytes] = (CARD, store / CARD)
        return [] if _is_there(root.remote, *card, root.there) else [card]
    if CARD in root.there:
        return []
    plan = joined_plan([Part(folder, trusted=True) for folder in part_folders(store)])  # no shard is opened
    markers = [marker for part in parts for marker in part.markers]
    return [(CARD, card_of(plan, markers, str(url)).encode())]


def _is_there(remote: RemoteFolder, name: str, source: Path | bytes, there: Mapping[str, FileIdentity]) -> bool:
    """Whether a small file is there with the same content."""
    known = there.get(name)
    if known is None or known.size != size_of(source):
        return False
    return remote.read(name, identity=known) == (source if isinstance(source, bytes) else source.read_bytes())
