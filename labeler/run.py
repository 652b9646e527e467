"""`label_images`: a complete labeling run, from images to a label store. It resumes automatically."""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labeler.base.errors import IntegrityError, LabelingError
from labeler.config import LabelerConfig
from labeler.executor import run_in_process
from labeler.fit_head import with_head
from labeler.make_plan import encoding_of, make_plan, plan_of_part
from labeler.ray_executor import refuse_absent_ray, run_on_ray
from labeler.sources.class_names import own_names, true_classes
from labeler.sources.image_source import ImageSource
from labeler.sources.open_source import open_source
from labeler.store.foreign_store import remember_written
from labeler.store.parts.extend_store import (
    Piece,
    extension_of,
    keep_head,
    pieces_of,
    publish_extension,
    refuse_unlabeled,
)
from labeler.store.parts.find_parts import store_bytes
from labeler.store.parts.same_images import LabeledImages, refuse_other_images
from labeler.store.plan import Plan, load_plan
from labeler.store.score_code import share_of_reference
from labeler.store.shard_markers import Marker
from labeler.store.shard_writer import begin_store, committed_shards, finish_store
from labeler.worker import LabelingJob, ShardTask

if TYPE_CHECKING:
    from labeler.teacher.linear_head import HeadFit

log = logging.getLogger("labeler")

SELDOM = 0.5  # share of images that are labeled with their folder's class
ENOUGH = 20  # images of known class that are needed to compare agreement with chance


@dataclass(frozen=True)
class LabelSummary:
    """The result of a labeling run. Counts are of images, and means are over the whole store.

    Attributes:
        store: The store's folder.
        rows: Images with labels.
        quarantined: Images that could not be labeled.
        labeled_now: Images that this run labeled.
        shards: Shards of the store.
        bytes_per_image: Size of the store per row, in bytes.
        seconds: Duration of this run, from when the first worker was ready.
        images_per_s: Speed of this run.
        kl: Mean KL(teacher ‖ store) per cell, in nats.
        coverage: Mean probability of the classes that the labels name.
        first_kept: Share of cells whose most probable class is kept.
        kl_of_reference: `kl` relative to that of the reference's files (five float16 logits per cell) for the same
            maps; None if it was not measured.
        agreement: Share of images whose mean map names the true class; None if no true class is known.
        known: Images whose true class is known.
        other_files: Files below the image root that are not images.
        head: How well the fitted head does on held-out images; None without `fit_head`.
    """

    store: str
    rows: int
    quarantined: int
    labeled_now: int
    shards: int
    bytes_per_image: float
    seconds: float
    images_per_s: float
    kl: float
    coverage: float
    first_kept: float
    kl_of_reference: float | None
    agreement: float | None
    known: int
    other_files: int
    head: HeadFit | None = None


def label_images(images: str | Path, store: str | Path, config: LabelerConfig) -> LabelSummary:
    """Labels every image of `images` and stores the labels. Shards that exist already are kept.

    Args:
        images: Whatever `open_source` takes: a folder, a list, tar shards, parquet files.
        store: Folder of the label store; created if needed.
        config: Settings of the run. With `extend`, `images` has the images of the store and new ones, which are labeled
            into a further part of it.

    Returns:
        What the run did.

    Raises:
        InputError: The images or settings cannot be used; raised before any work, as are the next two.
        TeacherError: The teacher cannot be used.
        MismatchError: The store was begun with other images or settings.
        LabelingError: The run could not finish. Committed shards are kept, and the same call resumes.
    """
    if config.workers:
        refuse_absent_ray()
    source, path = open_source(images, config.image_list, config.progress), Path(store)
    if config.extend:
        extension = extension_of(source, path)
        if extension is None:
            log.warning("nothing is new: %s has all %d images of %s", path, len(source), source.name)
        pieces = [] if extension is None else [extension]
    else:
        pieces = pieces_of(source, path)
    labeled, seconds, head = _label_pieces(pieces, source, path, config) if pieces else (0, 0.0, None)
    summary = replace(_summary(path, finish_store(path), labeled, seconds, source.other), head=head)
    plan = load_plan(path)
    assert plan is not None
    _warn_of_disagreement(summary, plan)
    return summary


def _label_pieces(
    pieces: list[Piece], source: ImageSource, store: Path, config: LabelerConfig
) -> tuple[int, float, HeadFit | None]:
    """Labels what is missing of each piece; returns the rows labeled, the seconds that it took, and the head's fit."""
    from labeler.base.runtime import pick_device
    from labeler.teacher.create_teacher import create_teacher

    begun = load_plan(store)
    # The driver of a cluster may not have a GPU itself.
    elsewhere = config.workers and config.ray_address and config.device != "auto"
    device = config.device if elsewhere else str(pick_device(config.device))
    here = "cpu" if elsewhere else device
    config, head = with_head(config, source, store, here, begun)
    settled = _with_autocast(config, device, bool(elsewhere))
    # Built here once, so that a wrong teacher is reported before any worker starts.
    teacher = create_teacher(settled.teacher, "cpu" if config.workers else device)
    encoding = encoding_of(source, settled, here, begun)
    labeled, seconds = 0, 0.0
    for piece in pieces:
        if piece.like is None:
            plan = make_plan(source, teacher.info, settled, encoding, begun, teacher.class_names)
        else:
            plan = plan_of_part(piece, piece.like, source, teacher.info, settled, encoding)
        try:
            if head is not None and piece.number:
                keep_head(store, piece.folder)
            rows, duration = _label_piece(piece, plan, source, store, config, device)
            first = piece.number == 0 or publish_extension(store, piece)
        except (IntegrityError, LabelingError):
            if piece.number == 0 or piece.folder.exists():
                raise
            first = False  # another run has published the folder under this one
        if not first:
            refuse_unlabeled(source, store)
            continue
        labeled, seconds = labeled + rows, seconds + duration
    return labeled, seconds, head


def _label_piece(
    piece: Piece, wanted: Plan, source: ImageSource, store: Path, config: LabelerConfig, device: str
) -> tuple[int, float]:
    """Begins or resumes one folder; returns the rows labeled and the seconds that it took."""
    plan = begin_store(piece.folder, wanted)
    if piece.begun is None and plan.meta.dataset_fingerprint != wanted.meta.dataset_fingerprint:
        begun = LabeledImages(piece.folder, plan.meta.dataset_fingerprint, ())
        refuse_other_images(piece.images, [begun], piece.folder)  # another run has just begun it
    if piece.number or piece.folder == store:
        _warn_of_other_folders(source, plan)
    markers = committed_shards(piece.folder, plan)
    targets = true_classes(source, plan.class_folders, plan.meta.num_classes)[piece.positions]
    shards = [shard for shard in range(plan.meta.shards) if shard not in markers]
    tasks = [make_task(plan, piece.images, targets, shard) for shard in shards]
    labeled = _run(tasks, piece.images, LabelingJob(piece.folder, plan, config, device), markers)
    if piece.folder != store:  # whose view shows all parts, and is written last
        finish_store(piece.folder)
    if not markers:  # existing shards may come from elsewhere
        remember_written(piece.folder)
    return labeled


def _warn_of_other_folders(images: ImageSource, plan: Plan) -> None:
    """Warns if the images' own classes, by folder or label, are not the teacher's."""
    own = own_names(images)
    if images.labels is not None and not own:
        own = [f"class {i}" for i in range(int(images.labels.max(initial=-1)) + 1)]
        unmatched = len(own) > plan.meta.num_classes
    else:
        unmatched = not plan.class_folders
    if len(own) > 1 and unmatched:
        log.warning(
            "the %d %s of %s (%s%s) are not the teacher's %d classes, so no image's true class is known and the labels "
            "cannot be checked against it; training gives the images' own classes a class head (data.classes=images). "
            "If they are the teacher's: `label --class-names FILE` lists its class names in order, one per line.",
            len(own), "folders" if images.labels is None else "labels", images.name, ", ".join(own[:3]),
            ", …" * (len(own) > 3), plan.meta.num_classes,
        )  # fmt: skip


def _warn_of_disagreement(summary: LabelSummary, plan: Plan) -> None:
    """Warns if the labels agree with the folders' classes seldom, or no more often than chance, up to 3 deviations."""
    known, chance = summary.known, 1 / plan.meta.num_classes
    if summary.agreement is None or known < ENOUGH:
        return
    if summary.agreement <= chance + 3 * math.sqrt(chance * (1 - chance) / known):
        log.warning(
            "only %.1f %% of %d images are labeled with their folder's class, no better than chance among %d classes: "
            "does the teacher have these classes, in this order? `label --class-names FILE` gives the teacher's order.",
            100 * summary.agreement, known, plan.meta.num_classes,
        )  # fmt: skip
    elif summary.agreement < SELDOM:
        log.warning(
            "only %.1f %% of %d images are labeled with their folder's class: a network learns these answers, with its "
            "class head too, and may end below one that learns the folders alone. Compare with data.store=none.",
            100 * summary.agreement, known,
        )  # fmt: skip


def _with_autocast(config: LabelerConfig, device: str, elsewhere: bool) -> LabelerConfig:
    """Returns `config` with an autocast precision in place of "auto", so that the plan records what the workers use.

    GPUs of other machines are assumed to have bfloat16; a worker whose GPU lacks it refuses to run.
    """
    import torch

    from labeler.base.runtime import pick_precision

    wanted, unseen = config.teacher.autocast, elsewhere and device.startswith("cuda")
    autocast = "bfloat16" if wanted == "auto" and unseen else pick_precision(wanted, torch.device(device))
    return replace(config, teacher=replace(config.teacher, autocast=autocast))


def make_task(plan: Plan, images: ImageSource, targets: np.ndarray, shard: int) -> ShardTask:
    """Returns the `ShardTask` of one shard; targets: int32 [N], the true classes of all images."""
    part = plan.slice_of(shard)
    return ShardTask(shard, images.part(range(part.start, part.stop)), tuple(targets[part].tolist()))


def _run(
    tasks: list[ShardTask], images: ImageSource, job: LabelingJob, markers: dict[int, Marker]
) -> tuple[int, float]:
    """Labels the shards of `tasks`; returns the rows labeled and the seconds since the first worker was ready."""
    from tqdm import tqdm

    if not tasks:
        return 0, 0.0
    slices = [job.plan.slice_of(shard) for shard in markers]
    done = sum(part.stop - part.start for part in slices)
    quarantined = sum(len(marker.quarantine) for marker in markers.values())
    execute = run_on_ray if job.config.workers else run_in_process
    began: list[float] = []
    labeled = 0

    def advance(images: int) -> None:
        began.append(time.perf_counter())
        bar.update(images)

    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(
        total=len(images), initial=done, unit="img", desc="label", disable=not job.config.progress, mininterval=interval
    ) as bar:
        bar.set_postfix(quarantined=quarantined, refresh=False)
        for result in execute(tasks, job, advance):
            quarantined += result.quarantined
            labeled += result.rows * result.committed  # without what another run on the same store committed meanwhile
            bar.set_postfix(quarantined=quarantined, refresh=False)
            ended = time.perf_counter()
    return labeled, ended - began[0]


def _summary(store: Path, markers: list[Marker], labeled: int, seconds: float, other: int) -> LabelSummary:
    """Sums up a finished run from the markers of all shards."""
    rows = sum(marker.rows for marker in markers)
    names = ("kl", "coverage", "first_kept", "reference_kl", "compared_kl", "agree", "known")
    total = {name: sum(m.stats.get(name, 0.0) for m in markers) for name in names}
    return LabelSummary(
        store=str(store),
        rows=rows,
        quarantined=sum(len(marker.quarantine) for marker in markers),
        labeled_now=labeled,
        shards=len(markers),
        bytes_per_image=store_bytes(store) / max(1, rows),
        seconds=seconds,
        images_per_s=labeled / seconds if seconds > 0 else 0.0,
        kl=total["kl"] / max(1, rows),
        coverage=total["coverage"] / max(1, rows),
        first_kept=total["first_kept"] / max(1, rows),
        kl_of_reference=share_of_reference(total["compared_kl"], total["reference_kl"], rows),
        agreement=total["agree"] / total["known"] if total["known"] else None,
        known=int(total["known"]),
        other_files=other,
    )
