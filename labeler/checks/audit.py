"""The accuracy of a store's labels: three errors in nats, measured by running its teacher again on some images.

storage  the stored map against the teacher's map
mirror   the teacher's map of an image against that of the mirrored image
crop     the stored labels of a random crop against the teacher's output for that crop

Legend: n images; C classes; P palette size; R tail size; H×W map grid; S side of the teacher's square input.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labeler.base.errors import InputError
from labeler.checks.relabel import refuse_foreign_teacher, teacher_of
from labeler.sources.image_source import BadImage, ImageSource, image_digest
from labeler.sources.open_source import open_images
from labeler.store.label_store import LabelStore

if TYPE_CHECKING:
    from torch import Tensor


SHARES = (0.9, 0.7, 0.5)  # share of the sides that a crop keeps
BATCH = 16  # images
KEPT, KEPT_ELEMENTS = 48, 64_000_000  # most images, and numbers, of the maps that are kept for a chart


@dataclass(frozen=True)
class Audit:
    """Three errors in nats, means over random images.

    Attributes:
        store: The store's folder.
        images: Number of random images.
        missing: Number of images that were not found or have changed.
        storage: KL(teacher's map ‖ stored map), mean over cells.
        reference: The same for five float16 logits per cell, which the reference's files keep.
        mirror: KL(map ‖ map of the mirrored image, mirrored back), mean over cells, of single passes.
        mirror_averaged: KL(map of a single pass ‖ average of both passes).
        crop: share of the sides kept -> KL(teacher's output for a crop ‖ mean of the stored map there).
        flip: Whether the store's maps are averages of both passes.
        input_size: S.
        precision: Score precision of the store.
    """

    store: str
    images: int
    missing: int
    storage: float
    reference: float
    mirror: float
    mirror_averaged: float
    crop: dict[str, float]
    flip: bool
    input_size: int
    precision: str

    @property
    def storage_of_reference(self) -> float:
        """`storage` relative to the same error of the reference's files."""
        return self.storage / max(self.reference, 1e-12)

    def advice(self) -> dict[str, str]:
        """Returns how to lower each error, in a few words."""
        finer = "`--quality high` or `--bytes-per-image N`" if self.precision == "uint8" else "a larger `--palette`"
        both = "`--tta flip` is on: the store keeps the average of both passes"
        return {
            "storage": f"less with more bytes: {finer}",
            "mirror": both if self.flip else "less with `--tta flip`, which stores the average of both passes",
            "crop": f"an `--input-size` above {self.input_size} is better for small crops, and worse for large ones",
        }

    def text(self) -> str:
        """Returns the three errors with advice, one per line."""
        advice = self.advice()
        lines = {
            "storage": f"{self.storage:.3f} ({self.storage_of_reference:.2f} of top-5 float16 files')",
            "mirror": f"{self.mirror:.3f}, to the average {self.mirror_averaged:.3f}",
            "crop": ", ".join(f"{error:.3f} at {share}" for share, error in self.crop.items()),
        }
        wide = max(map(len, lines.values()))
        missing = f", {self.missing} more not found or changed" if self.missing else ""
        return "\n".join(
            [
                f"audit: KL in nats, means over {self.images} images{missing}",
                *(f"  {name:<7}  {line:<{wide}}  {advice[name]}" for name, line in lines.items()),
            ]
        )


def audit_store(
    store: str | Path,
    images: str | Path,
    count: int,
    *,
    device: str = "auto",
    seed: int = 0,
    trusted: bool = False,
    progress: bool = False,
) -> Audit:
    """Measures the accuracy of a store's labels by running its teacher again.

    Args:
        store: The store's folder.
        images: The image root that was labeled.
        count: Number of random images.
        device: Device of the teacher.
        seed: Seed of the random images and crops.
        trusted: Trust this store, so that its teacher may be run; see `verify_store`.
        progress: Show a progress bar.

    Returns:
        The errors.

    Raises:
        InputError: The store is not yours, was imported, or none of its images is found.
        TeacherError: Its teacher can no longer be built.
        IntegrityError: Its teacher has changed, or an image can no longer be decoded.
    """
    labels = LabelStore(store, trusted=trusted)
    refuse_foreign_teacher(labels.trusted, labels.plan, labels.path, "`audit`")
    return audit_labels(labels, images, count, device=device, seed=seed, progress=progress)[0]


def audit_labels(
    labels: LabelStore, images: str | Path, count: int, *, device: str = "auto", seed: int = 0, progress: bool = False
) -> tuple[Audit, Tensor]:
    """Does the same as `audit_store` for a trusted store; also returns the maps [K, C, H, W] of 48 of the images."""
    import torch
    from tqdm import tqdm

    from labeler.checks.audit_errors import errors_of
    from labeler.store.encoder import DENSE_ELEMENTS

    if count < 1 or not len(labels):
        raise InputError("there is nothing to audit", got=f"{count} of {len(labels)} rows", expected="one or more")
    meta = labels.meta
    drawn = np.random.default_rng(seed).permutation(len(labels))[:count]
    rows = np.array(sorted(drawn.tolist(), key=labels.keys.__getitem__), np.int64)  # as the source sorts its images
    source = open_images(images, [labels.keys[row] for row in rows])
    present = [i for i in range(len(rows)) if i not in source.problems]
    none = InputError(
        f"none of the images of {source.name!r} is one that was labeled", got=f"0 of {len(rows)}",
        remedy="Set `images` to the folder that was labeled.",
    )  # fmt: skip
    if not present:
        raise none
    teacher, decoder = teacher_of(labels, device)
    elements = meta.num_classes * meta.grid[0] * meta.grid[1]
    step = max(1, min(BATCH, DENSE_ELEMENTS // elements))
    digests = labels.column("image_digest")
    columns: list[np.ndarray] = []
    maps: list[Tensor] = []
    with tqdm(total=len(present), desc="audit", unit="img", disable=not progress) as bar:
        for start in range(0, len(present), step):
            chunk = present[start : start + step]
            read = [_read_labeled(source, i, int(digests[rows[i]])) for i in chunk]
            files = {int(rows[i]): data for i, data in zip(chunk, read, strict=True) if data is not None}
            if files:
                errors, logits = errors_of(labels, files, teacher, decoder, seed, SHARES)
                columns.append(errors)
                room = min(KEPT, max(1, KEPT_ELEMENTS // elements)) - sum(map(len, maps))
                maps.append(logits[: max(0, room)])
            bar.update(len(chunk))
    if not columns:
        raise none
    every = np.concatenate(columns)
    storage, reference, mirror, averaged, *crop = every.mean(0).tolist()
    audit = Audit(
        str(labels.path), len(every), len(rows) - len(every), storage, reference, mirror, averaged,
        {str(share): error for share, error in zip(SHARES, crop, strict=True)}, teacher.info.flip,
        teacher.info.input_size, meta.precision,
    )  # fmt: skip
    return audit, torch.cat(maps)


def _read_labeled(source: ImageSource, position: int, digest: int) -> bytes | None:
    """Returns the image file's bytes; None if it is not what was labeled."""
    try:
        data = source.read(position)
    except BadImage:
        return None
    return data if image_digest(data) == digest else None
