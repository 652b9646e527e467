"""The files of a store that travel, by name. Names that come from a remote store are never taken as paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labeler.base.errors import IntegrityError
from labeler.remote.remote_files import RemoteFolder, is_url
from labeler.store.plan import Plan
from labeler.store.shard_markers import Marker, read_marker, shard_stem

CARD = "README.md"
SHARD_FILE = re.compile(r"shard-\d{5,}-of-\d{5,}\.[0-9a-f]{12}\.h5")


@dataclass(frozen=True)
class Transfer:
    """What was sent or fetched.

    Attributes:
        store: The store's folder.
        url: The remote store.
        shards: Number of shards.
        rows: Number of rows.
        files: Files that were transferred now.
        bytes: Their bytes.
        skipped: Shards that were there already.
        seconds: Time that it took.
    """

    store: str
    url: str
    shards: int
    rows: int
    files: int
    bytes: int
    skipped: int
    seconds: float

    def text(self) -> str:
        """Returns the summary in one line."""
        there = f", {self.skipped} of them there already" if self.skipped else ""
        return (
            f"{self.shards} shards with {self.rows:,} rows{there}; {self.files} files, {self.bytes:,} bytes in "
            f"{self.seconds:.1f} s"
        )


def remote_folder(place: str | Path) -> RemoteFolder:
    """Returns the folder of a URL, or of a path."""
    return RemoteFolder(str(place) if is_url(str(place)) else f"file://{Path(place).absolute()}")


def marker_names(plan: Plan) -> list[str]:
    """Returns the names of all markers, by shard."""
    return [f"{shard_stem(shard, plan.meta.shards)}.json" for shard in range(plan.meta.shards)]


def check_names(markers: list[Marker]) -> None:
    """Raises IntegrityError if a marker names what is no shard's file."""
    for marker in markers:
        if not SHARD_FILE.fullmatch(marker.file) or marker.file.split(".")[1] != marker.sha256[:12]:
            raise IntegrityError(
                f"the marker of shard {marker.shard} is damaged",
                got=f"file {marker.file[:80]!r}", expected="the name of a shard's file, with its digest",
            )  # fmt: skip


def read_markers(folder: Path, plan: Plan) -> dict[int, Marker]:
    """Returns shard -> marker of all markers in a folder, with names that are safe. Raises IntegrityError."""
    found = ((shard, read_marker(folder, shard, plan.meta.shards)) for shard in range(plan.meta.shards))
    markers = {shard: marker for shard, marker in found if marker is not None}
    check_names(list(markers.values()))
    return markers


@contextmanager
def named(folder: Path, url: str) -> Iterator[None]:
    """Names the remote store, not the local copies of its records, in errors of the block."""
    try:
        yield
    except IntegrityError as error:
        problem, got = error.problem.replace(str(folder), url), error.got
        raise IntegrityError(
            problem, got=got, expected=error.expected, remedy="Push the store there again, from where it is whole."
        ) from None
