"""The files of a store that travel, by name. Names that come from a remote store are never taken as paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from labeler.remote.remote_files import RemoteFolder
from labeler.remote.urls import is_url
from labeler.store.plan import Plan
from labeler.store.shard_markers import Marker, read_foreign_marker

CARD = "README.md"


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


def markers_in(folder: Path, plan: Plan) -> dict[int, Marker]:
    """Returns shard -> marker of all markers in a folder. Raises IntegrityError if one is damaged."""
    found = ((shard, read_foreign_marker(folder, shard, plan.meta.shards)) for shard in range(plan.meta.shards))
    return {shard: marker for shard, marker in found if marker is not None}
