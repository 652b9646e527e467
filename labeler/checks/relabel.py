"""Builds a store's teacher again from its record, and labels images again.

Legend: C classes; H×W map grid; K requested rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labeler.base.errors import InputError, IntegrityError
from labeler.config import LabelerConfig
from labeler.sources.image_source import BadImage, ImageSource
from labeler.sources.open_source import open_images
from labeler.store.label_store import LabelStore
from labeler.store.plan import Plan
from labeler.teacher.teacher_config import TeacherConfig

if TYPE_CHECKING:
    from labeler.sources.decoding.decoder import Decoder
    from labeler.teacher.create_teacher import LoadedTeacher

OLD_AUTOCASTS = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}  # words of format 1.0


def refuse_foreign_teacher(trusted: bool, plan: Plan, store: str | Path, option: str) -> None:
    """Checks that the teacher that a store names, which may be any code, may be run here.

    Args:
        trusted: Whether it may.
        plan: The store's plan.
        store: The store's folder.
        option: The option that needs the teacher, for the message.

    Raises:
        InputError: It may not.
    """
    if not trusted:
        raise InputError(
            f"{str(store)!r} was not written here in one run, and its teacher can be any code that it names",
            got=repr(plan.meta.teacher.get("name"))[:80],
            remedy=f"Give `trusted` if you trust this store, or omit {option}.",
        )


def teacher_of(store: LabelStore, device: str) -> tuple[LoadedTeacher, Decoder]:
    """Builds a store's teacher and decoder from its record.

    Args:
        store: The store.
        device: Device of the teacher.

    Returns:
        (teacher, decoder).

    Raises:
        InputError: The store was imported.
        TeacherError: The teacher cannot be built.
        IntegrityError: The teacher has other weights now.
    """
    from labeler.base.runtime import pick_device
    from labeler.teacher.create_teacher import create_teacher
    from labeler.worker import decoder_for

    record, device = store.meta.teacher, str(pick_device(device))
    if store.meta.score_kind != "logprob":
        raise InputError(f"{str(store.path)!r} was imported", got="no teacher in it", expected="a store labeled here")
    config = LabelerConfig(
        TeacherConfig(
            name=record["name"],
            checkpoint=record["checkpoint"],
            ema=record.get("ema"),
            random_weights=record["random_weights"],
            num_classes=store.meta.num_classes,
            input_size=record["input_size"],
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            view=record["view"],
            flip=record["flip"],
            autocast=OLD_AUTOCASTS.get(record["autocast"], record["autocast"]),
            head=str(store.head_file()) if "head" in record else None,
        ),
        orientation=store.meta.orientation,
    )
    teacher = create_teacher(config.teacher, device)
    if teacher.info.weights_sha256 != record["weights_sha256"]:
        raise IntegrityError(
            "the store's teacher has changed since labeling",
            got=f"weights {teacher.info.weights_sha256[:12]}",
            expected=record["weights_sha256"][:12],
            remedy="Restore the checkpoint that it had.",
        )
    return teacher, decoder_for(teacher, config, device, 1)


def teacher_kl(
    store: LabelStore, rows: np.ndarray, images: str | Path, teacher: LoadedTeacher, decoder: Decoder
) -> np.ndarray:
    """Runs the teacher again and compares its maps with those in the store.

    Args:
        store: The store.
        rows: int [K]: row numbers.
        images: The images that were labeled, as for `open_source`.
        teacher: The store's teacher.
        decoder: The teacher's decoder.

    Returns:
        float64 [K, 2]: KL(teacher ‖ store), mean over cells, in nats; and the KL of encoding the new maps, which the
        first value equals if nothing has changed.
    """
    from labeler.store.encoder import encode_maps, encode_planes

    plan, parts = store.plan, []
    source = open_images(images, [store.keys[row] for row in sorted(set(rows.tolist()))])
    for chunk in np.array_split(rows, max(1, len(rows) // 16)):
        decoded = decoder([_bytes_of(source, store.keys[row]) for row in chunk])
        if decoded.failures:
            raise IntegrityError(
                "an image can no longer be decoded", got=store.keys[chunk[next(iter(decoded.failures))]]
            )
        logits = teacher.label(decoded.pixels)
        if plan.code.as_background or plan.code.values is None:
            again = encode_maps(logits, plan.encoding).kl
        else:  # format 1.0
            again = encode_planes(logits, plan.meta.palette, plan.code.values).kl
        log_p = logits.double().log_softmax(1).cpu()
        stored = store.read(chunk).to_torch().dense().double().clamp(min=1e-30).log()
        kl = (log_p.exp() * (log_p - stored)).sum(1).mean((1, 2)).numpy()
        parts.append(np.stack([kl, again], 1))
    return np.concatenate(parts)


def _bytes_of(source: ImageSource, key: str) -> bytes:
    """Reads an image by its key. Raises IntegrityError if that fails."""
    position = source.position(key)
    assert position is not None
    try:
        return source.read(position)
    except BadImage as error:
        raise IntegrityError("an image can no longer be read", got=f"{key!r}: {error}") from None
