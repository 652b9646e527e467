"""Labels one shard: a pure function of its images, the teacher and the plan, on any machine.

Legend: B images of a batch; C classes; P palette size; R tail size; H×W map grid; S side of the teacher's input.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from labeler.base.errors import LabelingError, MismatchError, TeacherError
from labeler.config import LabelerConfig
from labeler.sources.decoding.check_header import check_header
from labeler.sources.decoding.create_decoder import create_decoder
from labeler.sources.decoding.decoder import Decoded, Decoder, DecodeSettings, teacher_region
from labeler.sources.image_source import BadImage, ImageSource, image_digest
from labeler.store.encoder import EncodedMaps, encode_maps
from labeler.store.plan import Plan
from labeler.store.row_schema import ShardRows, encoded_columns
from labeler.store.shard_markers import read_marker
from labeler.store.shard_writer import write_shard
from labeler.teacher.create_teacher import LoadedTeacher, create_teacher

BATCHES_AHEAD = 2
SUMS = ("kl", "coverage", "entropy", "first_kept")  # fields of `EncodedMaps` that are added up over the rows


@dataclass(frozen=True)
class ShardTask:
    """The images of one shard: a contiguous slice of the sorted keys.

    Attributes:
        shard: Number of the shard.
        images: The images.
        targets: Class ids; −1 where unknown.
    """

    shard: int
    images: ImageSource
    targets: tuple[int, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the images."""
        return self.images.keys


@dataclass(frozen=True)
class ShardResult:
    """A worker's report of a finished shard.

    Attributes:
        shard: Number of the shard.
        rows: Images with labels.
        quarantined: Images that could not be labeled.
        committed: False if another writer was first.
    """

    shard: int
    rows: int
    quarantined: int
    committed: bool


@dataclass(frozen=True)
class LoadedBatch:
    """A batch of decoded images.

    Attributes:
        positions: K positions in the shard.
        digests: K digests of the image files.
        decoded: The K decoded images.
        failures: position -> reason, for the images that cannot be used.
    """

    positions: list[int]
    digests: list[int]
    decoded: Decoded
    failures: dict[int, str]


@dataclass(frozen=True)
class LabelingJob:
    """What all workers of a run share.

    Attributes:
        store: The store's folder.
        plan: The store's plan.
        config: Settings of the run.
        device: Device of the teachers.
    """

    store: Path
    plan: Plan
    config: LabelerConfig
    device: str


class ShardLabeler:
    """A worker's teacher and decoder, loaded once and used for one shard after another.

    Args:
        job: The run.
        threads: CPU threads.

    Raises:
        MismatchError: The teacher has other weights or another precision than the plan.
    """

    def __init__(self, job: LabelingJob, threads: int) -> None:
        import torch

        # The last bits of sums depend on the thread count: fix it, so that labeling a shard again gives the same shard.
        torch.set_num_threads(threads)
        self.job, planned = job, job.plan.meta.teacher
        self.teacher = create_teacher(job.config.teacher, job.device)
        self.decoder = decoder_for(self.teacher, job.config, job.device, threads)
        weights = self.teacher.info.weights_sha256
        if weights != planned["weights_sha256"]:
            raise MismatchError(
                "this worker's teacher has other weights than the run",
                got=weights[:12],
                expected=planned["weights_sha256"][:12],
                remedy="Give every node the same checkpoint and the same library versions.",
            )
        precision = self.teacher.info.autocast
        if precision != planned["autocast"]:
            raise MismatchError(
                "this worker's GPU uses another precision than the run",
                got=precision,
                expected=planned["autocast"],
                remedy="Start a new store with autocast float16, which all GPUs support, or use GPUs of one kind.",
            )

    def __call__(self, task: ShardTask, advance: Callable[[int], None] = lambda _: None) -> ShardResult:
        """Labels and commits one shard.

        Args:
            task: The shard.
            advance: Called every few images with their number.

        Returns:
            The report.
        """
        marker = read_marker(self.job.store, task.shard, self.job.plan.meta.shards)
        if marker is not None:  # committed by another run on the same store
            advance(len(task.keys))
            return ShardResult(task.shard, marker.rows, len(marker.quarantine), committed=False)
        return self._label(task, advance)

    def _label(self, task: ShardTask, advance: Callable[[int], None]) -> ShardResult:
        """Decodes, labels, encodes and commits the images of `task`; those that cannot be labeled are quarantined."""
        job, config = self.job, self.job.config
        failures: dict[int, str] = {}
        parts: list[ShardRows] = []
        stats = dict.fromkeys((*SUMS, "agree", "known", "reference_kl", "compared_kl"), 0.0)
        for batch in load_batches(task, self.decoder, config.batch_size, config.min_side, config.max_pixels):
            if batch.positions:
                logits = self.teacher.label(batch.decoded.pixels)
                means = logits.mean((2, 3))
                finite = means.isfinite().all(1)
                if not finite.all():
                    batch = _without(batch, finite.tolist(), self.teacher)
                    logits, means = logits[finite], means[finite]
            failures |= batch.failures
            if batch.positions:
                maps = encode_maps(logits, job.plan.encoding)
                parts.append(_rows(task, batch, maps, job.plan, config, self.teacher.info.crop_pct))
                predicted = means.argmax(1).cpu().numpy()
                _add_stats(stats, maps, predicted, parts[-1].target)
            advance(len(batch.positions) + len(batch.failures))
        quarantine = [{"key": task.keys[i], "reason": failures[i]} for i in sorted(failures)]
        rows = ShardRows.joined(parts, job.plan.layout)
        committed = write_shard(job.store, job.plan, task.shard, rows, quarantine, stats, task.keys)
        return ShardResult(task.shard, len(rows), len(quarantine), committed)


def decoder_for(teacher: LoadedTeacher, config: LabelerConfig, device: str, threads: int) -> Decoder:
    """Creates the decoder for a teacher's input."""
    settings = DecodeSettings(
        size=teacher.info.input_size,
        view=config.teacher.view,
        crop_pct=teacher.info.crop_pct,
        interpolation=teacher.info.interpolation,
        orientation=config.orientation,
        batch_size=config.batch_size,
        threads=threads,
        device=device,
    )
    return create_decoder(config.decoder, settings)


def load_batches(
    task: ShardTask, decoder: Decoder, batch_size: int, min_side: int, max_pixels: int
) -> Iterator[LoadedBatch]:
    """Yields batches in order, read and decoded by a thread that works ahead of the teacher.

    Args:
        task: The shard.
        decoder: The decoder.
        batch_size: Images per batch.
        min_side: Shortest side of an image in pixels.
        max_pixels: Most pixels of an image.

    Yields:
        The batches.
    """
    count = len(task.keys)
    slices = iter([range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)])
    thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
    pending: deque[Future[LoadedBatch]] = deque()
    try:
        while True:
            for positions in islice(slices, 1 + BATCHES_AHEAD - len(pending)):
                try:
                    pending.append(thread.submit(_load, task, positions, decoder, min_side, max_pixels))
                except RuntimeError as error:
                    remedy = "Raise the limit on processes and threads (ulimit -u), or free some."
                    raise LabelingError("cannot start a thread to read images", got=error, remedy=remedy) from None
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _load(task: ShardTask, positions: range, decoder: Decoder, min_side: int, max_pixels: int) -> LoadedBatch:
    """Reads, checks and decodes the images at `positions`."""
    encoded, kept, failures = [], [], {}
    for i in positions:
        try:
            data = task.images.read(i)
            check_header(data, min_side, max_pixels)
        except BadImage as error:
            failures[i] = str(error)
        else:
            encoded.append(data)
            kept.append(i)
    decoded = decoder(encoded)
    failures |= {kept[index]: reason for index, reason in decoded.failures.items()}
    return LoadedBatch(
        [kept[index] for index in decoded.kept],
        [image_digest(encoded[index]) for index in decoded.kept],
        decoded,
        failures,
    )


def _without(batch: LoadedBatch, finite: list[bool], teacher: LoadedTeacher) -> LoadedBatch:
    """Returns the batch without the images whose scores are not finite."""
    kept = [index for index, good in enumerate(finite) if good]
    if not kept and len(finite) > 1:
        raise TeacherError(
            f"teacher {teacher.info.name} gives no finite scores for a whole batch of images",
            got=f"NaN or infinity, autocast {teacher.info.autocast}",
            remedy="Use autocast float32, or check std and the weights.",
        )
    decoded = batch.decoded
    lost = [i for i, good in zip(batch.positions, finite, strict=True) if not good]
    return LoadedBatch(
        [batch.positions[index] for index in kept],
        [batch.digests[index] for index in kept],
        Decoded(decoded.pixels[kept], decoded.sizes[kept], kept, {}),
        batch.failures | dict.fromkeys(lost, "the teacher's scores are not finite"),
    )


def _rows(
    task: ShardTask, batch: LoadedBatch, maps: EncodedMaps, plan: Plan, config: LabelerConfig, crop_pct: float
) -> ShardRows:
    """Returns a batch's rows."""
    sizes = batch.decoded.sizes
    region = [teacher_region(height, width, config.teacher.view, crop_pct) for height, width in sizes.tolist()]
    return ShardRows(
        **encoded_columns(maps, plan.meta.num_classes),
        region=np.array(region, np.float32),
        image_size=sizes.astype(np.uint32),
        target=np.array([task.targets[i] for i in batch.positions], np.int32),
        image_digest=np.array(batch.digests, np.uint64),
        keys=tuple(task.keys[i] for i in batch.positions),
    )


def _add_stats(stats: dict[str, float], maps: EncodedMaps, predicted: np.ndarray, target: np.ndarray) -> None:
    """Adds a batch to the sums over rows."""
    for name in SUMS:
        stats[name] += float(getattr(maps, name).sum(dtype=np.float64))
    compared = np.isfinite(maps.reference_kl)
    stats["reference_kl"] += float(maps.reference_kl[compared].sum(dtype=np.float64))
    stats["compared_kl"] += float(maps.kl[compared].sum(dtype=np.float64))
    stats["known"] += int((target >= 0).sum())
    stats["agree"] += int((predicted == target).sum())
