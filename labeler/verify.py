"""`verify`: every bit of a store, its images, and that its teacher still says the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from labeler.base.errors import InputError, IntegrityError
from labeler.relabel import refuse_foreign_teacher, teacher_kl, teacher_of
from labeler.store.check_store import Verification, check_store
from labeler.store.foreign_store import refuse_hostile
from labeler.store.label_store import LabelStore


def verify_store(
    store: str | Path,
    images: str | Path | None = None,
    relabel: int = 0,
    *,
    device: str = "auto",
    progress: bool = False,
    seed: int = 0,
    trusted: bool = False,
) -> Verification:
    """Check a store's plan, markers, digests, layout, rows and view; with `images`, also every image file.

    Args:
        store: Its folder.
        images: The image root that was labeled.
        relabel: Run the store's teacher again on this many random rows (needs `images`).
        device: For `relabel`.
        progress: Show bars.
        seed: Of the random rows.
        trusted: Trust this store: no check in a child process, and its teacher, which may be any function that can
            be imported, may be run.

    Raises:
        InputError: There is no store at all, or options do not go together. All else is a problem in the result.
    """
    found = check_store(store, trusted=trusted, progress=progress)
    if relabel and images is None:
        raise InputError("--relabel needs --images", remedy="Give the image root that was labeled.")
    if found.problems or images is None:
        return found
    opened = LabelStore(store, trusted=True)
    if relabel:
        refuse_foreign_teacher(trusted or refuse_hostile(Path(store)), opened.plan, Path(store), "--relabel")
    checked, problems = opened.check_images(images, progress)
    found = replace(found, images_checked=checked, problems=problems)
    return _relabeled(found, opened, Path(images), relabel, device, seed) if relabel and not problems else found


def _relabeled(
    found: Verification, store: LabelStore, images: Path, count: int, device: str, seed: int
) -> Verification:
    """The teacher asked again for random rows, and those that it now sees otherwise."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(store))[:count])
    try:
        teacher, decoder = teacher_of(store, device)
        kl = teacher_kl(store, rows, images, teacher, decoder)
    except IntegrityError as error:
        return replace(found, problems=(str(error),))
    problems = []
    for row, (value, anew) in zip(rows.tolist(), kl.tolist(), strict=True):
        limit = 1.5 * anew + 0.05  # room for another device's rounding; another image or map is far above
        if not value <= limit:
            problems.append(
                f"row {row} ({store.keys[row]!r}): the teacher now differs by {value:.3f} nats (limit {limit:.3f})"
            )
    return replace(found, relabeled=len(rows), relabel_kl=float(kl[:, 0].mean()), problems=tuple(problems))
