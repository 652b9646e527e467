"""What a labeling run has to label: a store's own folder, each of its parts, or a further part of new images.

A further part is written as `extending/`, a store of its own, so that a run that was killed resumes. When it is whole,
one rename gives it the number that was free when its images were compared with the store's. Of two runs at once the
second finds the number taken.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from labeler.base.errors import InputError, IntegrityError, LabelingError, MismatchError, TokenLabelError
from labeler.base.whole_files import publish_exclusively, sync_folder
from labeler.sources.image_source import ImageSource, are_labeled_images, difference
from labeler.store.foreign_store import refuse_hostile_part
from labeler.store.label_store import LabelStore
from labeler.store.parts.find_parts import EXTENDING, part_folders, part_name
from labeler.store.parts.open_part import Part
from labeler.store.parts.same_images import LabeledImages, changed_parts, new_images, refuse_other_images
from labeler.store.plan import HEAD_FILE, Plan, load_plan
from labeler.store.shard_writer import disk_error

log = logging.getLogger("labeler")


@dataclass(frozen=True)
class Piece:
    """Images that are labeled into one folder.

    Attributes:
        folder: The folder.
        images: The images.
        positions: int64 [n]: their positions among all images of the run.
        begun: The plan in the folder; None: there is none yet.
        like: The plan of a store with parts, to which these labels belong; None: it is a store without parts.
        number: Number of the part that it becomes when it is whole; 0: it has its place.
    """

    folder: Path
    images: ImageSource
    positions: np.ndarray
    begun: Plan | None
    like: Plan | None = None
    number: int = 0


def pieces_of(images: ImageSource, store: Path) -> list[Piece]:
    """Finds what a run that begins or resumes a store has to label.

    Args:
        images: All images.
        store: The store's folder.

    Returns:
        One piece for each part.

    Raises:
        MismatchError: The images are not those of the store.
        IntegrityError: The store is not what the labeler writes.
    """
    begun, folders = load_plan(store), part_folders(store)
    everything = Piece(store, images, np.arange(len(images)), begun)
    if begun is None or (len(folders) == 1 and begun.meta.dataset_fingerprint == images.fingerprint):
        return [everything]
    parts = labeled_images(folders)
    if len(parts) > 1:
        parts = _with_the_rest(parts, images)
    refuse_other_images(images, parts, store)
    if len(parts) == 1:
        return [everything]
    return [_piece_of(part, images) for part in parts]


def _piece_of(part: LabeledImages, images: ImageSource) -> Piece:
    """Returns the piece of a part whose images are all there."""
    folder = Path(part.place)
    plan = load_plan(folder)
    positions = np.array([images.position(key) for key in part.keys], np.int64)
    return Piece(folder, images.part(positions.tolist()), positions, plan, plan)


def labeled_images(folders: Sequence[Path]) -> list[LabeledImages]:
    """Returns the images of each folder, with unknown keys where a shard is missing or damaged."""
    for folder in folders:
        refuse_hostile_part(folder)
    found = []
    for folder in folders:
        plan = load_plan(folder)
        if plan is None:
            raise IntegrityError(f"{str(folder)!r} is not a part of a store", got="no plan.json in it")
        found.append(LabeledImages(folder, plan.meta.dataset_fingerprint, stored_keys(folder)))
    return found


def stored_keys(folder: Path) -> tuple[str, ...]:
    """Returns the sorted keys of one part, quarantined ones included; empty if it is incomplete or damaged."""
    keys: list[str] = []
    try:
        part = Part(folder, trusted=True)  # checked before, see `labeled_images`
        for marker in part.markers:
            keys += part.open_shard(marker).keys
            keys += [entry["key"] for entry in marker.quarantine]
    except TokenLabelError:
        return ()
    return tuple(sorted(keys))


def _with_the_rest(parts: list[LabeledImages], images: ImageSource) -> list[LabeledImages]:
    """Gives the images that no part has to the one part whose keys are not known, so that it can be labeled again."""
    unknown = [part for part in parts if not part.keys]
    if len(unknown) > 1:
        names = ", ".join(Path(part.place).name for part in unknown)
        raise IntegrityError(
            f"shards are missing or damaged in {len(unknown)} parts", got=names,
            expected="at most one such part, whose images are then those of no other part",
            remedy="Restore the store from a copy, or label the images again.",
        )  # fmt: skip
    known = {key for part in parts for key in part.keys}
    rest = tuple(key for key in images.keys if key not in known)
    guessed = [part if part.keys else replace(part, keys=rest) for part in parts]
    return parts if changed_parts(images, guessed) else guessed


def extension_of(images: ImageSource, store: Path) -> Piece | None:
    """Finds the images that a store does not have yet.

    Args:
        images: All images, old and new.
        store: The store's folder.

    Returns:
        The further part; None if nothing is new.

    Raises:
        InputError: There is no store.
        IntegrityError: The store is not whole.
        MismatchError: Images are gone or changed, or another extension was begun.
    """
    plan = load_plan(store)
    if plan is None:
        raise InputError(
            f"there is no label store {str(store)!r} to extend", remedy="Omit `extend`: that begins a store."
        )
    try:
        labels = LabelStore(store)
        known = labels.labeled_images(digests=True)
    except IntegrityError as error:
        remedy = "Complete it first: label the images that it was begun with, without `extend`."
        raise IntegrityError(error.problem, got=error.got, expected=error.expected, remedy=remedy) from None
    positions = new_images(images, known, store)
    folder = store / EXTENDING
    _remove_what_another_was_faster_with(folder, known)
    begun = load_plan(folder)
    new = images.part(positions.tolist())
    if begun is not None:
        _refuse_other_extension(folder, begun, new)
    if not len(new):
        return None
    return Piece(folder, new, positions, begun, labels.plan, len(labels.parts))


def _remove_what_another_was_faster_with(folder: Path, parts: Sequence[LabeledImages]) -> None:
    """Removes an extension whose images are already a part."""
    begun = load_plan(folder)
    if begun is not None and begun.meta.dataset_fingerprint in {part.fingerprint for part in parts}:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_other_extension(folder: Path, begun: Plan, new: ImageSource) -> None:
    """Raises MismatchError if an extension was begun with other images."""
    keys = stored_keys(folder)
    if not are_labeled_images(new, begun.meta.dataset_fingerprint, keys):
        raise MismatchError(
            f"an extension of the store was begun in {str(folder)!r} with other images",
            got=difference(new, keys), expected=f"the {begun.meta.num_images:,} new images that it was begun with",
            remedy="Give these and no others; or remove that folder, and what it has so far is labeled again.",
        )  # fmt: skip


def keep_head(store: Path, part: Path) -> None:
    """Keeps a store's linear head with a part of it as well, which is a store of its own."""
    try:
        part.mkdir(exist_ok=True)
        publish_exclusively(part / HEAD_FILE, (store / HEAD_FILE).read_bytes())
    except OSError as error:
        raise disk_error(part, error) from None


def publish_extension(store: Path, piece: Piece) -> bool:
    """Makes a whole extension a part of its store, with one rename.

    Args:
        store: The store's folder.
        piece: The extension.

    Returns:
        False if another run was first.

    Raises:
        LabelingError: The disk fails.
    """
    target = store / part_name(piece.number)
    try:
        os.rename(piece.folder, target)
        sync_folder(store)
    except OSError as error:
        if piece.number >= len(part_folders(store)):
            raise disk_error(target, error) from None
        return False
    return True


def refuse_unlabeled(images: ImageSource, store: Path) -> None:
    """Checks, where another run was first, that it labeled the same images; what is left of this run is removed.

    Args:
        images: All images, old and new.
        store: The store's folder.

    Raises:
        LabelingError: Some have no labels yet.
    """
    known = LabelStore(store).labeled_images(digests=True)
    if len(new_images(images, known, store)):
        raise LabelingError(
            f"another run has extended the store {str(store)!r} with other images", remedy="Run the same command again."
        )
    _remove_what_another_was_faster_with(store / EXTENDING, known)
    log.warning("another run was faster: it has added the new images to %s", store)
