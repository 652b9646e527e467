"""The plan of a labeling run: from its images, settings and teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from labeler.base.settings import names_that_affect
from labeler.choose_encoding import asked_encoding, fit_encoding
from labeler.config import LabelerConfig
from labeler.sources.class_names import classes_as_before, name_classes
from labeler.sources.image_source import ImageSource
from labeler.store.parts.extend_store import Piece
from labeler.store.parts.join_parts import refuse_other_part
from labeler.store.plan import Plan, plan_of
from labeler.store.score_code import Encoding, code_table

if TYPE_CHECKING:
    from labeler.teacher.create_teacher import TeacherInfo

MIN_SHARD_SIZE, MAX_SHARD_SIZE = 256, 10_000


def make_plan(
    images: ImageSource,
    info: TeacherInfo,
    config: LabelerConfig,
    encoding: Encoding,
    begun: Plan | None,
    class_names: tuple[str, ...] = (),
    classes: tuple[tuple[str, ...], Mapping[str, int]] | None = None,
) -> Plan:
    """Returns the plan for these settings. The shard size of an existing store is kept unless one is set.

    `class_names` are those that the teacher has; `classes` are names and folders that are settled already.
    """
    names, folders = classes or name_classes(images, info.num_classes, config.class_names, class_names)
    size = config.shard_size or (begun.shard_size if begun else default_shard_size(len(images)))
    coded = encoding.precision == "uint8"
    palette, tail = encoding.places(info.num_classes)
    settings = {name: getattr(config, name) for name in sorted(names_that_affect(LabelerConfig, "values"))}
    settings |= {"from_list": config.image_list is not None}
    if coded:
        settings |= {"levels": encoding.levels, "threshold": encoding.threshold}
    return plan_of(
        images,
        folders,
        settings,
        size,
        tuple(code_table(encoding.levels).tolist()) if coded else (),
        num_classes=info.num_classes,
        class_names=names,
        palette=palette,
        tail=tail,
        grid=info.grid,
        score_kind="logprob",
        precision=config.precision,
        orientation=config.orientation,
        teacher=teacher_record(info, config),
    )


def default_shard_size(images: int) -> int:
    """Returns the images per shard for about 64 shards, an even load for workers; from 256 to 10,000."""
    return min(MAX_SHARD_SIZE, max(MIN_SHARD_SIZE, math.ceil(images / 64)))


def teacher_record(info: TeacherInfo, config: LabelerConfig) -> dict[str, Any]:
    """Returns what a store records of its teacher: enough to compare two teachers, and to build it again."""
    record = dataclasses.asdict(info)
    record.update(view=config.teacher.view, checkpoint=config.teacher.checkpoint)
    record.update(random_weights=config.teacher.random_weights)
    if config.teacher.ema is not None:
        record.update(ema=config.teacher.ema)
    if config.teacher.head is not None:
        from labeler.teacher.linear_head import head_record

        record.update(head=head_record(config.teacher.head))
    return record


def plan_of_part(
    piece: Piece, like: Plan, source: ImageSource, info: TeacherInfo, config: LabelerConfig, encoding: Encoding
) -> Plan:
    """Returns the plan of a part of a store; `like`: the store's plan. Raises MismatchError if settings differ."""
    classes = classes_as_before(
        source, like.meta.class_names, like.class_folders, like.meta.num_classes, config.class_names
    )
    if piece.number == 0:  # each part was begun with its own
        config = replace(config, shard_size=None)
    plan = make_plan(piece.images, info, config, encoding, piece.begun, classes=classes)
    refuse_other_part(piece.folder.parent, like, piece.folder, plan)
    recorded = like if piece.begun is None else piece.begun
    return replace(plan, settings={**plan.settings, "from_list": recorded.settings.get("from_list", False)})


def encoding_of(images: ImageSource, config: LabelerConfig, device: str, begun: Plan | None) -> Encoding:
    """Returns the encoding of the settings, or the one that fits `bytes_per_image`."""
    if config.bytes_per_image is None:
        return asked_encoding(config)
    if begun is not None and begun.settings.get("bytes_per_image") == config.bytes_per_image:
        return begun.encoding  # as it was chosen before the first shard
    return fit_encoding(config, images, device)
