"""`pull_store`: fetches a store from a URL into a folder, with every digest checked; a pull that was stopped goes on.

Nothing of what is fetched is trusted: names come from the plan's number of shards, never from a listing; plan and
markers have checksums and types that are checked; a shard must have its marker's size and sha256; the view is written
anew. A shard's marker is written after its file, as when labels are made. At the end a child process checks the store,
as every store from elsewhere (`labeler.store.foreign_store`).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from labeler.base.errors import InputError, IntegrityError, MismatchError
from labeler.base.whole_files import TEMPORARY, publish_exclusively, replace_file, sync_folder
from labeler.remote.in_parallel import in_parallel
from labeler.remote.local_copy import PUT_AGAIN, named, read_record
from labeler.remote.remote_files import RemoteFolder
from labeler.remote.urls import is_url
from labeler.share.store_files import CARD, Transfer, markers_in, remote_folder
from labeler.store.foreign_store import refuse_hostile
from labeler.store.parts.find_parts import part_folders, part_name
from labeler.store.parts.open_part import further_urls
from labeler.store.plan import HEAD_FILE, PLAN_FILE, Plan, load_plan
from labeler.store.shard_markers import Marker, check_file, marker_names, read_marker
from labeler.store.shard_writer import finish_store


def pull_store(url: str | Path, store: str | Path, *, progress: bool = False, trusted: bool = False) -> Transfer:
    """Fetches a store from a URL or another folder.

    Args:
        url: Where from: hf://datasets/USER/NAME, s3://BUCKET/PATH, any URL that fsspec can read, or a folder.
        store: The folder to write; created if needed.
        progress: Show a progress bar.
        trusted: Skip the check in a child process; for your own stores, or those of people you trust.

    Returns:
        What was fetched.

    Raises:
        InputError: There is no store, no permission, no driver, no space, or the folder contains something else.
        MismatchError: The folder contains another store, or the store has a newer format.
        IntegrityError: The remote store is not complete, or damaged; what is whole was fetched.
        RemoteError: The service does not answer; the same call goes on.
    """
    started, path = time.perf_counter(), Path(store)
    parts = [_pull_part(str(url), path, progress)]
    places = further_urls(str(url)) if is_url(str(url)) else [*map(str, part_folders(Path(url))[1:])]
    for number, place in enumerate(places, 1):
        parts.append(_pull_further(place, path / part_name(number), progress))
    for folder in reversed(part_folders(path)):  # the view over all parts is written last
        finish_store(folder)
    _fetch_card(remote_folder(url), path)
    if not trusted:
        refuse_hostile(path)
    return Transfer(
        str(store), str(url), sum(len(part.markers) for part in parts), sum(part.rows for part in parts),
        sum(len(part.fetched) for part in parts), sum(part.bytes for part in parts),
        sum(len(part.markers) - len(part.fetched) for part in parts), time.perf_counter() - started,
    )  # fmt: skip


def _pull_further(url: str, path: Path, progress: bool) -> _Pulled:
    """Fetches a part; it gets its name when it is whole, so that the store here can be read meanwhile."""
    if path.exists():
        return _pull_part(url, path, progress)
    work = path.with_name(f"pulling-{path.name}")
    pulled = _pull_part(url, work, progress)
    finish_store(work)
    os.rename(work, path)
    sync_folder(path.parent)
    return pulled


@dataclass(frozen=True)
class _Pulled:
    """What was fetched of one folder.

    Attributes:
        markers: The markers of all of its shards.
        fetched: The shards that were fetched now.
        bytes: Bytes of these.
    """

    markers: dict[int, Marker]
    fetched: list[int]
    bytes: int

    @property
    def rows(self) -> int:
        """Rows of all of its shards."""
        return sum(marker.rows for marker in self.markers.values())


def _pull_part(url: str, path: Path, progress: bool) -> _Pulled:
    """Fetches one folder, without its parts; see `pull_store` for the errors."""
    remote = remote_folder(url)
    with tempfile.TemporaryDirectory(prefix="token-labeling-") as folder:
        records = Path(folder)
        plan = _fetch_plan(remote, records)
        _begin(path, records / PLAN_FILE, remote)
        names = marker_names(plan)
        in_parallel(lambda name: _fetch_record(remote, name, records), names, 16)
        with named(records, remote.url):
            markers = markers_in(records, plan)
        missing = [shard for shard in markers if not _is_whole(path, plan, markers[shard])]
        size = sum(markers[shard].size for shard in missing)
        _refuse_full_disk(path, size)
        with tqdm(total=size, desc="pull", unit="B", unit_scale=True, disable=not progress) as bar:
            in_parallel(lambda shard: _fetch_shard(remote, path, markers[shard], bar.update), missing)
        for shard in markers:
            publish_exclusively(path / names[shard], (records / names[shard]).read_bytes())
    absent = [shard for shard in range(plan.meta.shards) if shard not in markers]
    if absent:
        raise IntegrityError(
            f"the store at {remote.url} is not complete",
            got=f"{len(markers)} of {plan.meta.shards} shards, without shard {absent[0]}",
            remedy="What there is was fetched. Finish the push to it, then pull again.",
        )  # fmt: skip
    _fetch_head(remote, path, plan)
    return _Pulled(markers, missing, size)


def _fetch_plan(remote: RemoteFolder, records: Path) -> Plan:
    """Fetches and reads the plan; raises InputError if there is none."""
    with named(records, remote.url):
        plan = load_plan(records) if _fetch_record(remote, PLAN_FILE, records) else None
    if plan is None:
        raise InputError(f"{remote.url} is not a label store", got="no plan.json in it", remedy="Check the address.")
    return plan


def _fetch_record(remote: RemoteFolder, name: str, records: Path) -> bool:
    """Fetches the plan or a marker. Returns False if there is none."""
    data = read_record(remote, name)
    if data is not None:
        (records / name).write_bytes(data)
    return data is not None


def _begin(store: Path, plan: Path, remote: RemoteFolder) -> None:
    """Creates the folder with its plan, or checks that it has the same plan."""
    store.mkdir(parents=True, exist_ok=True)
    if not (store / PLAN_FILE).exists():
        foreign = sorted(one.name for one in store.iterdir() if not one.name.startswith(TEMPORARY))
        if foreign:
            raise InputError(
                f"{str(store)!r} is not empty and not a label store", got=", ".join(foreign[:3]),
                remedy="Choose an empty or a new folder.",
            )  # fmt: skip
        publish_exclusively(store / PLAN_FILE, plan.read_bytes())
    if (store / PLAN_FILE).read_bytes() != plan.read_bytes():
        raise MismatchError(
            f"{str(store)!r} has another store than {remote.url}", got="another plan.json",
            remedy="Choose an empty or a new folder.",
        )  # fmt: skip


def _is_whole(store: Path, plan: Plan, marker: Marker) -> bool:
    """Whether a shard is here, bit by bit. Raises MismatchError if another one is, which a run has labeled here."""
    try:
        here = read_marker(store, marker.shard, plan.meta.shards)
        if here is not None and here != marker:
            check_file(store, here)
            raise MismatchError(
                f"{str(store)!r} has labels of its own", got=f"shard {marker.shard} with other labels",
                remedy="Choose an empty or a new folder.",
            )  # fmt: skip
    except IntegrityError:  # damaged: it is fetched
        (store / marker_names(plan)[marker.shard]).unlink(missing_ok=True)
    try:
        check_file(store, marker)
        return True
    except IntegrityError:
        return False


def _refuse_full_disk(store: Path, size: int) -> None:
    """Raises InputError if a disk has less space than is about to be written."""
    free = shutil.disk_usage(store).free
    if size > free:
        raise InputError(
            f"the store does not fit on the disk of {str(store)!r}", got=f"{free:,} bytes free", expected=f"{size:,}",
            remedy="Free some space, or choose a folder on another disk.",
        )  # fmt: skip


def _fetch_shard(remote: RemoteFolder, store: Path, marker: Marker, fetched: Callable[[int], object]) -> None:
    """Fetches a shard's file, and checks it before it has its name."""
    known = remote.identity(marker.file)
    if known.size != marker.size:
        raise IntegrityError(
            f"{remote.url_of(marker.file)} is damaged", got=f"{known.size} bytes", expected=f"{marker.size} bytes",
            remedy=PUT_AGAIN,
        )  # fmt: skip
    temporary = store / f"{TEMPORARY}{marker.file}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        remote.download(marker.file, temporary, known, marker.sha256)
        os.replace(temporary, store / marker.file)
    finally:
        temporary.unlink(missing_ok=True)
    fetched(marker.size)


def _fetch_head(remote: RemoteFolder, store: Path, plan: Plan) -> None:
    """Fetches the teacher's head that the plan names, if any. Raises IntegrityError if it is not there, or another."""
    if plan.head is None or (store / HEAD_FILE).is_file():
        return
    digest = plan.head[1]
    data = read_record(remote, HEAD_FILE)
    found = "no such file" if data is None else f"sha256 {hashlib.sha256(data).hexdigest()}"
    if data is None or found != f"sha256 {digest}":
        raise IntegrityError(
            f"{remote.url_of(HEAD_FILE)} is damaged", got=found[:19], expected=f"sha256 {digest[:12]}", remedy=PUT_AGAIN
        )
    replace_file(store / HEAD_FILE, data)


def _fetch_card(remote: RemoteFolder, store: Path) -> None:
    """Fetches the card, if there is one and none is here."""
    if (store / CARD).exists():
        return
    data = read_record(remote, CARD)
    if data is not None:
        replace_file(store / CARD, data)
