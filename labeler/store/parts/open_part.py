"""A part of a store, open for reading: a folder here, or one behind a URL whose shards are fetched on first use."""

from __future__ import annotations

from pathlib import Path

from labeler.base.errors import InputError, IntegrityError
from labeler.base.open_files import OpenFiles
from labeler.remote.local_copy import read_record
from labeler.remote.remote_files import RemoteFolder
from labeler.store.foreign_store import (
    CHECKED,
    WRITTEN,
    check_known,
    open_folder,
    refuse_hostile_part,
    refuse_hostile_shard,
)
from labeler.store.hdf5.read_shard import ShardReader
from labeler.store.parts.find_parts import part_folders, part_name
from labeler.store.plan import HEAD_FILE, PLAN_FILE, load_plan
from labeler.store.shard_markers import Marker, check_file, read_markers

MOST_PARTS = 9_999  # behind a URL, where somebody else answers


class Part:
    """A complete store without parts of its own, or one part of a store.

    Args:
        place: Its folder or URL.
        trusted: Skip the check of a part from elsewhere.

    Attributes:
        place: The folder or URL.
        folder: The folder here that its files are in.
        plan: Its plan.
        markers: Its markers.
        written: Whether this user wrote it.
        checked: Whether its shards can be opened as they are.

    Raises:
        InputError: There is no plan.
        MismatchError: It has a newer format.
        IntegrityError: Shards are missing, or a file is not what the labeler writes.
        RemoteError: The service of its URL does not answer.
    """

    def __init__(self, place: Path | str, trusted: bool = False) -> None:
        self.place = place
        self.folder, self._remote = open_folder(place)
        known = check_known(self.folder) if self._remote else None
        if self._remote is None and not trusted:
            known = WRITTEN if refuse_hostile_part(self.folder) else CHECKED
        self.written = known == WRITTEN
        self.checked, self._all_here = trusted or known is not None, self._remote is None
        plan = load_plan(self.folder)
        if plan is None:
            raise InputError(
                f"{str(place)!r} is not a label store",
                got="no plan.json in it" if self._remote or self.folder.is_dir() else "no such folder",
                remedy="Label one with `python -m labeler label`.",
            )
        self.plan = plan
        self.markers: list[Marker] = read_markers(self.folder, plan, place)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(marker.rows for marker in self.markers)

    @property
    def quarantine(self) -> list[dict[str, str]]:
        """{"key", "reason"} of each image that could not be labeled."""
        return [entry for marker in self.markers for entry in marker.quarantine]

    @property
    def bytes(self) -> int:
        """Bytes of all files; behind a URL, of shards, plan and markers."""
        if self._remote is None:
            return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())
        records = sum(file.stat().st_size for file in self.folder.glob("*.json"))
        return records + sum(marker.size for marker in self.markers)

    def path_of(self, marker: Marker) -> Path:
        """Returns where a shard's file is, or will be, here."""
        return self.folder / marker.file

    def open_shard(self, marker: Marker, files: OpenFiles | None = None, in_memory: bool = False) -> ShardReader:
        """Opens a shard, after comparing its file with its digest; fetches it first if need be."""
        if not self._all_here and self._remote is not None:
            self._remote.fetch(marker.file, marker.size, marker.sha256)
            if not self.checked:
                refuse_hostile_shard(self.folder, marker.shard, self.plan.meta.shards)
        check_file(self.folder, marker)
        return ShardReader(self.path_of(marker), self.plan.layout, marker.rows, in_memory=in_memory, files=files)

    def head_file(self) -> Path:
        """Returns the file of the teacher's linear head, fetched if need be."""
        if self._remote is not None and self.plan.head is not None:
            self._remote.fetch(HEAD_FILE, *self.plan.head)
        return self.folder / HEAD_FILE

    def fetch_all(self) -> None:
        """Fetches all shards, several at a time, and checks them at once."""
        if self._all_here or self._remote is None:
            return
        self._remote.fetch_all([(marker.file, marker.size, marker.sha256) for marker in self.markers])
        if not self.checked:
            refuse_hostile_part(self.folder)
        self.checked = self._all_here = True

    def close(self) -> None:
        """Lets the cache remove what was fetched."""
        if self._remote is not None:
            self._remote.close()


def open_parts(store: Path | str, trusted: bool = False) -> list[Part]:
    """Opens all parts of a store.

    Args:
        store: The store's folder or URL.
        trusted: Skip the check of parts from elsewhere.

    Returns:
        The parts, the store's own folder first; see `Part` for the errors.
    """
    parts = [Part(store, trusted)]
    if isinstance(store, Path):
        return parts + [Part(folder, trusted) for folder in part_folders(store)[1:]]
    return parts + [Part(url, trusted) for url in further_urls(store)]


def further_urls(store: str) -> list[str]:
    """Returns the URLs of the parts below that of a store.

    Raises:
        IntegrityError: There is no end of them.
        RemoteError: The service does not answer.
    """
    urls: list[str] = []
    while _is_part(url := f"{store.rstrip('/')}/{part_name(len(urls) + 1)}"):
        urls.append(url)
        if len(urls) > MOST_PARTS:
            raise IntegrityError(
                f"{store} is refused", got=f"more than {MOST_PARTS:,} parts", expected="what the labeler writes",
                remedy="Get the store from elsewhere.",
            )  # fmt: skip
    return urls


def _is_part(url: str) -> bool:
    """Whether there is a part behind a URL."""
    try:
        return read_record(RemoteFolder(url), PLAN_FILE) is not None
    except InputError:  # services without a permission to list answer so where nothing is
        return False
