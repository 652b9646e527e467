"""`merge_stores`: one store of several, whose shards are hard links or copies of theirs.

The new store is built in a folder beside its place, and gets its name with one rename when it is whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labeler.base.errors import InputError, TokenLabelError
from labeler.base.whole_files import TEMPORARY, sync_folder
from labeler.store.label_store import LabelStore
from labeler.store.parts.find_parts import part_name, store_bytes
from labeler.store.parts.open_part import Part
from labeler.store.plan import HEAD_FILE, PLAN_FILE
from labeler.store.shard_markers import check_file, marker_names
from labeler.store.shard_writer import CANNOT_WRITE, disk_error, finish_store

NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK})


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        store: The new store's folder.
        parts: Its parts.
        shards: Its shards.
        rows: Its rows.
        bytes: Its size.
        linked: Files that are hard links.
        copied: Files that are copies.
    """

    store: str
    parts: int
    shards: int
    rows: int
    bytes: int
    linked: int
    copied: int

    def text(self) -> str:
        """Returns the summary as text."""
        files = f"{self.linked} files linked, {self.copied} copied" if self.linked + self.copied else "it was there"
        return f"{self.rows:,} rows in {self.shards} shards of {self.parts} parts; {files}\n{self.store}"


def merge_stores(stores: Sequence[str | Path], out: str | Path, copy: bool = False) -> Merged:
    """Makes one store of several that have the same settings and no image twice.

    Args:
        stores: Folders of the stores; each of their parts becomes a part of the new store, in this order.
        out: Folder of the new store.
        copy: Copy the files. False: hard links, and copies where the file system has none or is another one.

    Returns:
        What was merged. A store that was merged from these before is left as it is.

    Raises:
        InputError: There are too few stores, or `out` cannot be written or has something else in it.
        MismatchError: The stores have other settings, or share an image.
        IntegrityError: A store is incomplete or damaged.
        LabelingError: The disk is full or fails.
    """
    target = Path(out)
    if len(stores) < 2:
        raise InputError("there is nothing to merge", got=f"{len(stores)} store", expected="two or more")
    with LabelStore(list(stores)) as labels:
        fingerprint, counts = labels.fingerprint, (len(labels.parts), len(labels.markers), len(labels))
        linked = copied = 0
        if not _is_there(target, fingerprint):
            try:
                target.absolute().parent.mkdir(parents=True, exist_ok=True)
                with _built_beside(target) as folder:
                    linked, copied = _build(labels.parts, folder, copy)
            except OSError as error:
                # Of two merges at once, the second finds the same store there.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _is_there(target, fingerprint):
                    raise _cannot_write(target, error) from None
    return Merged(str(target), *counts, store_bytes(target), linked, copied)


def _is_there(target: Path, fingerprint: str) -> bool:
    """Whether the merged store is there already. Raises InputError if something else is."""
    try:
        found = os.listdir(target)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise InputError(f"{str(target)!r} cannot become a store", got="a file") from None
    if not found:
        return False
    try:
        same = LabelStore(target).fingerprint == fingerprint
    except TokenLabelError:
        same = False
    if not same:
        raise InputError(
            f"{str(target)!r} is not empty", got=", ".join(sorted(found)[:3]), expected="an empty or a new folder",
            remedy="Choose another folder.",
        )  # fmt: skip
    return True


@contextmanager
def _built_beside(target: Path) -> Iterator[Path]:
    """Yields a new folder that becomes `target` at the end of the block; removes what killed merges left."""
    prefix = f"{TEMPORARY}merge-{target.name}-"
    for left in target.absolute().parent.glob(f"{prefix}*"):
        with _locked(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    folder = target.absolute().with_name(f"{prefix}{secrets.token_hex(4)}")
    folder.mkdir()
    with _locked(
        folder
    ) as ours:  # as long as this process lives, no other merge takes the folder for one that was left
        if not ours:
            raise OSError(errno.EAGAIN, "another merge into this store has just begun")
        try:
            yield folder
            os.rename(folder, target)
            sync_folder(target.absolute().parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder as long as the block, or this process, lasts; yields whether nobody else has."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _build(parts: Sequence[Part], store: Path, copy: bool) -> tuple[int, int]:
    """Links or copies all parts into a new folder and finishes them; returns (files linked, files copied)."""
    folders = [store / part_name(number) for number in range(len(parts))]
    linked = copied = 0
    for part, folder in zip(parts, folders, strict=True):
        folder.mkdir(exist_ok=True)
        for name in _names(part):
            is_link = not copy and _linked(part.folder / name, folder / name)
            if not is_link:
                _copy(part.folder / name, folder / name)
            linked, copied = linked + is_link, copied + (not is_link)
        for marker in part.markers:
            if copied:
                check_file(folder, marker)
    for folder in reversed(folders):  # the view over all parts comes last
        finish_store(folder)
        sync_folder(folder)
    return linked, copied


def _names(part: Part) -> list[str]:
    """Returns the names of all files of a part that are not made anew."""
    files = [marker.file for marker in part.markers]
    head = [HEAD_FILE] if part.plan.head is not None else []
    return [*files, *marker_names(part.plan), *head, PLAN_FILE]


def _linked(source: Path, target: Path) -> bool:
    """Makes a hard link; returns False where the file system has none, or is another one."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    """Copies a file, durably."""
    with open(source, "rb") as old, open(target, "xb") as new:
        shutil.copyfileobj(old, new, 1 << 20)
        new.flush()
        os.fsync(new.fileno())


def _cannot_write(target: Path, error: OSError) -> TokenLabelError:
    """Returns the error to raise when the new store cannot be written."""
    if error.errno in CANNOT_WRITE:
        return InputError(f"the store {str(target)!r} cannot be written", got=error.strerror)
    return disk_error(target, error)
