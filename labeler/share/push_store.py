"""`push_store`: sends a store to a URL. What is there already is left; a push that was stopped goes on.

The plan is sent first, then the shards, the view, the quarantine and the card, and the markers last of all. A store is
complete when it has all its markers, so whoever reads the remote store finds all of it, or is told that it is not
complete. A shard's name has its digest, and services show a file only when it is whole: a shard that is there under its
name, with its size, is not sent again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from labeler.base.errors import InputError, IntegrityError, MismatchError
from labeler.remote.failures import NotThere
from labeler.remote.hub import size_of
from labeler.remote.remote_files import FileIdentity, RemoteFolder, in_parallel
from labeler.share.dataset_card import card_of
from labeler.share.store_files import CARD, Transfer, markers_in, remote_folder
from labeler.store.hdf5 import VIEW_FILE
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
    plan, markers = _local(path)
    remote = remote_folder(url)
    there = remote.files()
    present = _refuse_other_store(path, plan, remote, set(there))
    missing = [marker for marker in markers if marker.file not in there or there[marker.file].size != marker.size]
    in_parallel(lambda marker: check_file(path, marker), missing)
    steps: list[Files] = [
        [] if PLAN_FILE in there else [(PLAN_FILE, path / PLAN_FILE)],
        [(marker.file, path / marker.file) for marker in missing],
        [file for file in _small_files(path, plan, markers, str(url), there) if not _is_there(remote, *file, there)],
        [(name, path / name) for name in marker_names(plan) if name not in present],
    ]
    total = sum(size_of(source) for step in steps for _, source in step)
    with tqdm(total=total, desc="push", unit="B", unit_scale=True, disable=not progress) as bar:
        for step in steps:
            remote.put_all(step, bar.update)
    remote.sweep(
        {PLAN_FILE, VIEW_FILE, QUARANTINE_FILE, CARD, HEAD_FILE, *marker_names(plan), *(m.file for m in markers)}
    )
    return Transfer(
        str(store), str(url), len(markers), sum(marker.rows for marker in markers), sum(map(len, steps)), total,
        len(markers) - len(missing), time.perf_counter() - started,
    )  # fmt: skip


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


def _small_files(store: Path, plan: Plan, markers: list[Marker], url: str, there: Mapping[str, FileIdentity]) -> Files:
    """Returns the files beside plan, shards and markers. A card that somebody has written there stays."""
    files: Files = [(name, store / name) for name in (QUARANTINE_FILE, VIEW_FILE)]
    if plan.head is not None:
        files.append((HEAD_FILE, store / HEAD_FILE))
    if (store / CARD).is_file():
        files.append((CARD, store / CARD))
    elif CARD not in there:
        files.append((CARD, card_of(plan, markers, url).encode()))
    return files


def _is_there(remote: RemoteFolder, name: str, source: Path | bytes, there: Mapping[str, FileIdentity]) -> bool:
    """Whether a small file is there with the same content."""
    known = there.get(name)
    if known is None or known.size != size_of(source):
        return False
    return remote.read(name, identity=known) == (source if isinstance(source, bytes) else source.read_bytes())
