"""A store's own teacher, built again from its record and asked once more.

Legend: C classes; H×W map grid; K rows asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labeler.base.errors import InputError, IntegrityError
from labeler.config import LabelerConfig
from labeler.sources.images import image_path
from labeler.store.label_store import LabelStore
from labeler.store.plan import Plan
from labeler.teacher.teacher_config import TeacherConfig

if TYPE_CHECKING:
    from labeler.sources.decoder import Decoder
    from labeler.teacher.create_teacher import LoadedTeacher

OLD_AUTOCASTS = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}  # words of format 1.0


def refuse_foreign_teacher(trusted: bool, plan: Plan, store: Path, option: str) -> None:
    """Raise InputError where the teacher that a store names, which may be any code, is not to be run here."""
    if not trusted:
        raise InputError(
            f"{str(store)!r} was not written in one run of yours, and its teacher may be any code that it names",
            got=repr(plan.meta.teacher.get("name"))[:80],
            remedy=f"Give --trusted if the store is your own or a friend's, or leave {option} away.",
        )


def teacher_of(store: LabelStore, device: str) -> tuple[LoadedTeacher, Decoder]:
    """The store's own teacher and decoder, built again from its record. Raises TeacherError, IntegrityError."""
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
            random_weights=record["random_weights"],
            num_classes=store.meta.num_classes,
            input_size=record["input_size"],
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            view=record["view"],
            flip=record["flip"],
            autocast=OLD_AUTOCASTS.get(record["autocast"], record["autocast"]),
        ),
        orientation=store.meta.orientation,
    )
    teacher = create_teacher(config.teacher, device)
    if teacher.info.weights_sha256 != record["weights_sha256"]:
        raise IntegrityError(
            "the store's teacher has changed since",
            got=f"weights {teacher.info.weights_sha256[:12]}",
            expected=record["weights_sha256"][:12],
            remedy="Give it the checkpoint that it had.",
        )
    return teacher, decoder_for(teacher, config, device, 1)


def teacher_kl(
    store: LabelStore, rows: np.ndarray, images: Path, teacher: LoadedTeacher, decoder: Decoder
) -> np.ndarray:
    """float64 [K, 2]: KL(teacher ‖ store) of rows, mean over cells, in nats, with the teacher run again on the images.

    The second column is what coding these maps anew costs, which is what an honest row has.
    """
    from labeler.store.encoder import encode_maps, encode_planes

    plan, found = store.plan, []
    for chunk in np.array_split(rows, max(1, len(rows) // 16)):
        decoded = decoder([image_path(images, store.keys[row]).read_bytes() for row in chunk])
        if decoded.failures:
            raise IntegrityError(
                "an image cannot be decoded any more", got=store.keys[chunk[next(iter(decoded.failures))]]
            )
        logits = teacher.label(decoded.pixels)
        if plan.code.as_background or plan.code.values is None:
            anew = encode_maps(logits, plan.encoding).kl
        else:  # format 1.0
            anew = encode_planes(logits, plan.meta.palette, plan.code.values).kl
        log_p = logits.double().log_softmax(1).cpu()
        stored = store.read(chunk).to_torch().dense().double().clamp(min=1e-30).log()
        kl = (log_p.exp() * (log_p - stored)).sum(1).mean((1, 2)).numpy()
        found.append(np.stack([kl, anew], 1))
    return np.concatenate(found)
