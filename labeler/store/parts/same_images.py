"""Compares images with those that the parts of a store were labeled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labeler.base.errors import MismatchError
from labeler.sources.image_source import BadImage, ImageSource, are_labeled_images, difference, image_digest

NAMED = 3  # images in a message


@dataclass(frozen=True)
class LabeledImages:
    """The images of one part of a store.

    Attributes:
        place: The part's folder or URL.
        fingerprint: Their fingerprint.
        keys: Their sorted keys, those in the quarantine included; empty if they are not known.
        digests: key -> xxh3-64 of the file, of the images that have labels; None if they are not known.
    """

    place: Path | str
    fingerprint: str
    keys: tuple[str, ...]
    digests: dict[str, int] | None = None


def are_the_images(images: ImageSource, parts: Sequence[LabeledImages]) -> bool:
    """Whether images are all those of a store, and no others."""
    if len(parts) == 1:
        return are_labeled_images(images, parts[0].fingerprint, parts[0].keys)
    return len(images) == sum(len(part.keys) for part in parts) and not changed_parts(images, parts)


def changed_parts(images: ImageSource, parts: Sequence[LabeledImages]) -> list[LabeledImages]:
    """Returns the parts whose images are not among `images`, or have other file sizes there."""
    found = [(part, images_of_part(images, part.keys)) for part in parts]
    return [part for part, own in found if own is None or not are_labeled_images(own, part.fingerprint, part.keys)]


def images_of_part(images: ImageSource, keys: Sequence[str]) -> ImageSource | None:
    """Returns the images of some sorted keys; None if one of them is not there."""
    positions = [images.position(key) for key in keys]
    known = [position for position in positions if position is not None]
    return images.part(known) if len(known) == len(positions) else None


def refuse_other_images(images: ImageSource, parts: Sequence[LabeledImages], store: Path | str) -> None:
    """Checks that images are those of a store.

    Args:
        images: The images.
        parts: Those of each part of the store.
        store: The store's folder.

    Raises:
        MismatchError: Images are missing, new or changed; it names the first few.
    """
    if are_the_images(images, parts):
        return
    known = all(part.keys for part in parts)
    keys = tuple(sorted(key for part in parts for key in part.keys)) if known else ()
    only_new = known and set(keys) < set(images.keys) and not changed_parts(images, parts)
    one = len(parts) == 1
    raise MismatchError(
        f"the images of {images.name!r} are not those of the store {str(store)!r}",
        got=f"fingerprint {images.fingerprint[:12]}, " * one + difference(images, keys),
        expected=f"fingerprint {parts[0].fingerprint[:12]}" if one else f"the {len(keys):,} images of its parts",
        remedy="Label the new ones too with `label --extend`, or all of them into a new store."
        if only_new
        else "Restore the images, or label these into a new store.",
    )


def new_images(images: ImageSource, parts: Sequence[LabeledImages], store: Path | str) -> np.ndarray:
    """Finds the images that a store does not have yet, and checks that all others are as they were.

    Args:
        images: The images, old and new.
        parts: Those of each part of the store.
        store: The store's folder.

    Returns:
        int64 [n]: the positions of the new images.

    Raises:
        MismatchError: Images are gone or changed; it names the first few.
    """
    known = {key for part in parts for key in part.keys}
    gone = sorted(known - set(images.keys))
    if gone:
        raise MismatchError(
            f"{len(gone):,} images of the store {str(store)!r} are gone from {images.name!r}", got=_some(gone),
            expected="all images that were labeled, and new ones",
            remedy="Restore them; or label the new images into a store of their own, and merge the two.",
        )  # fmt: skip
    changed = changed_parts(images, parts)
    if changed:
        raise MismatchError(
            f"images of {images.name!r} changed after they were labeled", got=_some(_changed(images, changed[0])),
            expected=f"those of {str(changed[0].place)!r}",
            remedy="Restore them, or label these images into a new store.",
        )  # fmt: skip
    return np.array([i for i, key in enumerate(images.keys) if key not in known], np.int64)


def _changed(images: ImageSource, part: LabeledImages) -> list[str]:
    """Returns the keys of changed images: those with another digest, or else all that have none."""
    digests, wrong = part.digests or {}, []
    for key, digest in digests.items():
        position = images.position(key)
        try:
            if position is not None and image_digest(images.read(position)) != digest:
                wrong.append(key)
        except BadImage:
            wrong.append(key)
        if len(wrong) > NAMED:
            break
    return wrong or [key for key in part.keys if key not in digests]


def _some(keys: Sequence[str]) -> str:
    """Returns the first few keys as text."""
    return ", ".join(map(repr, keys[:NAMED])) + " …" * (len(keys) > NAMED)
