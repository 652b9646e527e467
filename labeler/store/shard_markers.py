"""A shard's marker: the record that its file is complete. The first writer of a marker wins.

A shard's file is complete on disk before its marker names it; the marker appears by an exclusive link, so of two
writers the first wins and the other sweeps its own file away.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from labeler.base.errors import IntegrityError
from labeler.base.whole_files import TEMPORARY, damaged, publish_exclusively, read_sealed, replace_file, sealed
from labeler.remote.urls import is_url
from labeler.store.plan import HEAD_FILE, Plan, parse_record

PUSH_AGAIN = "Finish the push to it: the same command goes on where it stopped."
MOST = 1 << 40  # bytes, or rows, of a shard


@dataclass(frozen=True)
class Marker:
    """The record of one finished shard: its file, and the images that could not be labeled.

    Attributes:
        shard: Number of the shard.
        file: Name of its file.
        size: Size of the file in bytes.
        sha256: Digest of the file.
        rows: Rows in the file.
        first_key: First key of the shard's slice, whether that image has a row or not.
        last_key: Last key of the slice, likewise.
        quarantine: {"key", "reason"} of each image of the slice that has no row.
        stats: Sums over rows: kl, entropy (nats), coverage, known (rows with a target), agree (the map names it).
    """

    shard: int
    file: str
    size: Annotated[int, Field(ge=0, lt=MOST)]
    sha256: str
    rows: Annotated[int, Field(ge=0, lt=MOST)]
    first_key: str
    last_key: str
    quarantine: list[dict[str, str]] = field(default_factory=list)
    stats: dict[str, int | float] = field(default_factory=dict)


def shard_stem(shard: int, shards: int) -> str:
    """Returns how the names of a shard's files begin, such as "shard-00000-of-00128"."""
    return f"shard-{shard:05d}-of-{shards:05d}"


def marker_names(plan: Plan) -> list[str]:
    """Returns the names of all markers of a store, in the order of the shards."""
    return [f"{shard_stem(shard, plan.meta.shards)}.json" for shard in range(plan.meta.shards)]


def publish_shard(store: Path, stem: str, data: bytes, fields: Mapping[str, Any]) -> bool:
    """Writes a shard's file, then its marker.

    Args:
        store: The store's folder.
        stem: How the names of the shard's files begin, see `shard_stem`.
        data: Bytes of the shard's file.
        fields: The marker's other fields.

    Returns:
        False if another writer's marker was there first.
    """
    digest = hashlib.sha256(data).hexdigest()
    path = store / f"{stem}.{digest[:12]}.h5"
    marker = Marker(file=path.name, size=len(data), sha256=digest, **fields)
    marker_path = store / f"{stem}.json"
    replace_file(path, data)
    if publish_exclusively(marker_path, sealed(asdict(marker))):
        return True
    if json.loads(marker_path.read_bytes())["file"] != path.name:
        path.unlink(missing_ok=True)
    return False


def read_marker(store: Path, shard: int, shards: int) -> Marker | None:
    """Reads a shard's marker; None if there is none. Raises IntegrityError if it is damaged."""
    path = store / f"{shard_stem(shard, shards)}.json"
    try:
        record = read_sealed(path)
    except FileNotFoundError:
        return None
    try:
        marker = parse_record(record, Marker)
    except ValueError as error:
        raise damaged(path, f"{error}: that no marker has") from None
    if not all({"key", "reason"} <= entry.keys() for entry in marker.quarantine):
        raise damaged(path, "a quarantine that no marker has")
    if marker.shard != shard or not marker.file.startswith(shard_stem(shard, shards) + ".") or "/" in marker.file:
        raise damaged(path, f"shard {marker.shard}, file {marker.file!r}")
    return marker


def read_foreign_marker(store: Path, shard: int, shards: int) -> Marker | None:
    """Reads a marker like `read_marker`; its shard, which is to be fetched, must have the usual name."""
    marker = read_marker(store, shard, shards)
    stem = shard_stem(shard, shards)
    if marker is not None and marker.file != f"{stem}.{marker.sha256[:12]}.h5":
        raise damaged(store / f"{stem}.json", f"file {marker.file[:80]!r}", "a name with its digest")
    return marker


def read_markers(store: Path, plan: Plan, name: str | Path | None = None) -> list[Marker]:
    """Reads the markers of all shards.

    Args:
        store: The store's folder.
        plan: The store's plan.
        name: What errors call the store; None: its folder.

    Returns:
        The markers, in the order of the shards.

    Raises:
        IntegrityError: A marker is missing, damaged or impossible.
    """
    shards, name = plan.meta.shards, str(name or store)
    found = [read_marker(store, shard, shards) for shard in range(shards)]
    markers = [marker for marker in found if marker is not None]
    if len(markers) < shards:
        raise IntegrityError(
            f"the store {name!r} is not complete",
            got=f"{len(markers)} of {shards} shards, without shard {found.index(None)}",
            remedy=PUSH_AGAIN if is_url(name) else "Run the labeling command again: it resumes where it stopped.",
        )
    for marker in markers:
        part = plan.slice_of(marker.shard)
        if marker.rows > part.stop - part.start:
            raise IntegrityError(
                f"the marker of shard {marker.shard} of {name!r} is impossible",
                got=f"{marker.rows:,} rows", expected=f"at most {part.stop - part.start:,}",
            )  # fmt: skip
    return markers


def check_file(store: Path, marker: Marker) -> None:
    """Compares a shard's file with its marker, bit by bit. Raises IntegrityError if they differ."""
    _compare(store / marker.file, marker.size, marker.sha256, "the file that its marker names")


def check_head(store: Path, plan: Plan) -> None:
    """Compares the file of the teacher's linear head, if it has one, with the plan. Raises IntegrityError likewise."""
    if plan.head is None:
        return
    try:
        _compare(store / HEAD_FILE, *plan.head, "the linear head that the plan names")
    except IntegrityError as error:  # unlike a shard it cannot be made again
        remedy = "Restore it from a copy, or label into a new folder."
        raise IntegrityError(error.problem, got=error.got, expected=error.expected, remedy=remedy) from None


def _compare(path: Path, expected_size: int, expected_sha256: str, expected: str) -> None:
    """Raises IntegrityError if a file is not there, or has another size or digest."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest() if size == expected_size else None
    except FileNotFoundError:
        raise damaged(path, "no such file", expected) from None
    if size != expected_size:
        raise damaged(path, f"{size} bytes", f"{expected_size} bytes")
    if digest != expected_sha256:
        raise damaged(path, f"sha256 {digest}"[:19], f"sha256 {expected_sha256}"[:19])


def sweep(store: Path, markers: list[Marker]) -> None:
    """Removes what crashed or slower writers left behind. Only for a store whose shards are all committed."""
    named = {marker.file for marker in markers}
    for path in store.iterdir():
        left_over = path.name.startswith("shard-") and path.suffix == ".h5" and path.name not in named
        if left_over or path.name.startswith(TEMPORARY):
            path.unlink(missing_ok=True)
