"""Images of each class, chosen and split by a hash of their keys: the same on every machine, whatever their order."""

from __future__ import annotations

import logging

import xxhash

from labeler.base.errors import InputError
from labeler.sources.class_names import own_names, true_classes
from labeler.sources.image_source import ImageSource

HELD_OUT = 5  # one in so many images of each class
SEED = 0
FEW = 10  # images of a class below which there is a warning

log = logging.getLogger("labeler")


def own_classes(images: ImageSource) -> tuple[str, ...]:
    """Returns the names of the images' own classes, their folders or labels.

    Raises:
        InputError: There are fewer than two.
    """
    names = own_names(images)
    if images.labels is not None and not names:
        names = [str(i) for i in range(int(images.labels.max(initial=-1)) + 1)]
    if len(names) < 2:
        kind = "folders" if images.labels is None else "classes in its labels"
        raise InputError(
            f"a head needs images of two classes or more in {images.name!r}",
            got=f"{len(names)} {kind}", expected="a folder for each class, named after it, or labels",
            remedy="Omit `fit_head` for a teacher that has a head already.",
        )  # fmt: skip
    return tuple(names)


def choose_images(images: ImageSource, classes: tuple[str, ...], most: int) -> dict[int, int]:
    """Chooses at most `most` images, the same number of each class where there are enough.

    A hash of each key decides which, so that new images do not change the choice among the others much.

    Returns:
        Position -> class id; within each class in the order of the hashes.

    Raises:
        InputError: A class has a single image, or `most` is less than two for each class.
    """
    if most < 2 * len(classes):
        raise InputError(
            "the head needs two images of each class or more", got=f"`head_images={most}`",
            expected=f"at least {2 * len(classes)} for {len(classes)} classes",
        )  # fmt: skip
    ids = true_classes(images, {name: i for i, name in enumerate(classes)}, len(classes)).tolist()
    members: list[list[tuple[int, int]]] = [[] for _ in classes]
    for position, (key, id_) in enumerate(zip(images.keys, ids, strict=True)):
        if id_ >= 0:
            members[id_].append((xxhash.xxh3_64_intdigest(key.encode(), SEED), position))
    share = _equal_share([len(some) for some in members], most)
    return {position: i for i, some in enumerate(members) for _, position in sorted(some)[:share]}


def _equal_share(counts: list[int], most: int) -> int:
    """Returns the largest number of images of each class with which there are at most `most` in all."""
    low, high = 1, max(counts)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(count, middle) for count in counts) <= most else (low, middle - 1)
    return low


def split(chosen: list[int], ids: dict[int, int], classes: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Splits chosen images into those to fit on and those to test on, a fifth of each class.

    Args:
        chosen: Positions, within each class in the order of the hashes.
        ids: Position -> class id.
        classes: Names of the classes.

    Returns:
        (positions to fit on, positions to test on).

    Raises:
        InputError: A class has fewer than two images.
    """
    fitted: list[int] = []
    held: list[int] = []
    few = []
    for i, name in enumerate(classes):
        members = [position for position in chosen if ids[position] == i]
        if len(members) < 2:
            raise InputError(
                f"the head needs two images of each class or more, one to fit on and one to test on: {name!r}",
                got=f"{len(members)} that can be read", expected="at least 2, better 20",
                remedy="Add images, or move the folder elsewhere.",
            )  # fmt: skip
        count = max(1, round(len(members) / HELD_OUT))
        held += members[:count]
        fitted += members[count:]
        few += [name] * (len(members) < FEW)
    if few:
        log.warning(
            "%d of the %d classes have fewer than %d images to fit the head with (%s%s)", len(few), len(classes), FEW,
            ", ".join(few[:3]), ", …" * (len(few) > 3),
        )  # fmt: skip
    return fitted, held
