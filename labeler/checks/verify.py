"""`verify`: checks a store bit by bit, its images, and whether its teacher still gives the same labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from labeler.base.errors import InputError, IntegrityError
from labeler.checks.relabel import refuse_foreign_teacher, teacher_kl, teacher_of
from labeler.store.check_store import Verification, check_store
from labeler.store.foreign_store import WRITTEN, check_known
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
    """Checks a store's plan, markers, digests, layout, rows and view; with `images`, also every image file.

    Args:
        store: The store's folder, or its URL.
        images: The image root that was labeled.
        relabel: Run the store's teacher again on this many random rows (needs `images`).
        device: Device of the teacher, for `relabel`.
        progress: Show progress bars.
        seed: Seed of the random rows.
        trusted: Trust this store: skip the check in a child process, and allow running its teacher, which may be any
            function that can be imported.

    Returns:
        What was checked, and all problems.

    Raises:
        InputError: There is no store, or options do not go together. Everything else is a problem in the result.
    """
    result = check_store(store, trusted=trusted, progress=progress)
    if relabel and images is None:
        raise InputError("`relabel` needs `images`", remedy="Give the image root that was labeled.")
    if result.problems or images is None:
        return result
    opened = LabelStore(store, trusted=True)
    if relabel:
        own = all(check_known(part.folder) == WRITTEN for part in opened.parts)
        refuse_foreign_teacher(trusted or own, opened.plan, opened.path, "`relabel`")
    checked, problems = opened.check_images(images, progress)
    result = replace(result, images_checked=checked, problems=problems)
    return _relabeled(result, opened, images, relabel, device, seed) if relabel and not problems else result


def _relabeled(
    result: Verification, store: LabelStore, images: str | Path, count: int, device: str, seed: int
) -> Verification:
    """Labels random rows again; those that differ now are problems."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(store))[:count])
    try:
        teacher, decoder = teacher_of(store, device)
        kl = teacher_kl(store, rows, images, teacher, decoder)
    except IntegrityError as error:
        return replace(result, problems=(str(error),))
    problems = []
    for row, (value, again) in zip(rows.tolist(), kl.tolist(), strict=True):
        limit = 1.5 * again + 0.05  # room for another device's rounding; a wrong image or map is far above
        if not value <= limit:
            problems.append(
                f"row {row} ({store.keys[row]!r}): the teacher now differs by {value:.3f} nats (limit {limit:.3f})"
            )
    return replace(result, relabeled=len(rows), relabel_kl=float(kl[:, 0].mean()), problems=tuple(problems))
