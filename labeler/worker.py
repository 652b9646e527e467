"""Labeling one shard: a plain function of its images, the teacher and the plan, wherever it runs.

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
from labeler.base.whole_files import read_marker
from labeler.config import LabelerConfig
from labeler.sources.create_decoder import create_decoder
from labeler.sources.decoder import Decoded, Decoder, DecodeSettings, teacher_region
from labeler.sources.images import BadImage, check_header, image_digest, read_image
from labeler.store.encoder import EncodedMaps, encode_maps
from labeler.store.plan import Plan
from labeler.store.shard_file import ShardRows
from labeler.store.shard_writer import store_classes, write_shard
from labeler.teacher.create_teacher import LoadedTeacher, create_teacher

BATCHES_AHEAD = 2
SUMS = ("kl", "coverage", "entropy", "first_kept")  # fields of `EncodedMaps` that are added up over the rows


@dataclass(frozen=True)
class ShardTask:
    """The images of one shard: a contiguous slice of the sorted keys.

    sizes: file sizes in bytes; targets: class ids, −1 unknown; problems: position -> why a file cannot be opened.
    """

    shard: int
    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    targets: tuple[int, ...]
    problems: dict[int, str]


@dataclass(frozen=True)
class ShardResult:
    """What a worker tells about a finished shard; `committed` is False where another writer was first."""

    shard: int
    rows: int
    quarantined: int
    committed: bool


@dataclass(frozen=True)
class LoadedBatch:
    """Positions in the shard [K], file digests [K], decoded images, and the reason for each position that fell out."""

    positions: list[int]
    digests: list[int]
    decoded: Decoded
    failures: dict[int, str]


class ShardLabeler:
    """A worker's teacher and decoder, loaded once and used for one shard after another."""

    def __init__(self, root: Path, store: Path, plan: Plan, config: LabelerConfig, device: str, threads: int) -> None:
        import torch

        # Sums differ in their last bit between thread counts: pinned, so that a shard labeled again is the same shard.
        torch.set_num_threads(threads)
        self.root, self.store, self.plan, self.config = root, store, plan, config
        self.teacher = create_teacher(config.teacher, device)
        self.decoder = decoder_for(self.teacher, config, device, threads)
        found = self.teacher.info.weights_sha256
        if found != plan.meta.teacher["weights_sha256"]:
            raise MismatchError(
                "this worker's teacher has other weights than the run's",
                got=found[:12],
                expected=plan.meta.teacher["weights_sha256"][:12],
                remedy="Give every node the same checkpoint and the same library versions.",
            )
        precision = self.teacher.info.autocast
        if precision != plan.meta.teacher["autocast"]:
            raise MismatchError(
                "this worker's GPU computes in another precision than the run's labels",
                got=precision,
                expected=plan.meta.teacher["autocast"],
                remedy="Begin a new store with autocast float16, which all GPUs have, or use GPUs of one kind.",
            )

    def __call__(self, task: ShardTask, advance: Callable[[int], None] = lambda _: None) -> ShardResult:
        """Label, commit and report one shard; `advance` is told of every few images done."""
        already = read_marker(self.store, task.shard, self.plan.meta.shards)
        if already is not None:  # by another run on the same store
            advance(len(task.keys))
            return ShardResult(task.shard, already.rows, len(already.quarantine), committed=False)
        return label_shard(task, self.root, self.store, self.plan, self.config, self.teacher, self.decoder, advance)


def decoder_for(teacher: LoadedTeacher, config: LabelerConfig, device: str, threads: int) -> Decoder:
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


def label_shard(
    task: ShardTask,
    root: Path,
    store: Path,
    plan: Plan,
    config: LabelerConfig,
    teacher: LoadedTeacher,
    decoder: Decoder,
    advance: Callable[[int], None],
) -> ShardResult:
    """Decode, label, encode and commit the images of `task`; images that cannot be labeled go to its quarantine."""
    failures: dict[int, str] = {}
    parts: list[ShardRows] = []
    stats = dict.fromkeys((*SUMS, "agree", "known", "reference_kl", "compared_kl"), 0.0)
    for batch in load_batches(task, root, config, decoder):
        if batch.positions:
            logits = teacher.label(batch.decoded.pixels)
            means = logits.mean((2, 3))
            finite = means.isfinite().all(1)
            if not finite.all():
                batch = _without(batch, finite.tolist(), teacher)
                logits, means = logits[finite], means[finite]
        failures |= batch.failures
        if batch.positions:
            maps = encode_maps(logits, plan.encoding)
            parts.append(_rows(task, batch, maps, plan, config, teacher.info.crop_pct))
            predicted = means.argmax(1).cpu().numpy()
            _add_stats(stats, maps, predicted, parts[-1].target)
        advance(len(batch.positions) + len(batch.failures))
    quarantine = [{"key": task.keys[i], "reason": failures[i]} for i in sorted(failures)]
    rows = _join(parts, plan)
    committed = write_shard(store, plan, task.shard, rows, quarantine, stats, task.keys)
    return ShardResult(task.shard, len(rows), len(quarantine), committed)


def load_batches(task: ShardTask, root: Path, config: LabelerConfig, decoder: Decoder) -> Iterator[LoadedBatch]:
    """Batches in order, read and decoded by a thread that works ahead of the teacher."""
    size, count = config.batch_size, len(task.keys)
    slices = iter([range(start, min(start + size, count)) for start in range(0, count, size)])
    thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
    pending: deque[Future[LoadedBatch]] = deque()
    try:
        while True:
            for positions in islice(slices, 1 + BATCHES_AHEAD - len(pending)):
                try:
                    pending.append(thread.submit(_load, task, positions, root, config, decoder))
                except RuntimeError as error:
                    remedy = "Raise the limit on processes and threads (ulimit -u), or free some."
                    raise LabelingError("no thread to read images can be started", got=error, remedy=remedy) from None
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _load(task: ShardTask, positions: range, root: Path, config: LabelerConfig, decoder: Decoder) -> LoadedBatch:
    """Read, check and decode the images at `positions`."""
    encoded, kept, failures = [], [], {}
    for i in positions:
        try:
            if i in task.problems:
                raise BadImage(task.problems[i])
            data = read_image(root, task.keys[i], task.sizes[i])
            check_header(data, config.min_side, config.max_pixels)
        except BadImage as error:
            failures[i] = str(error)
        else:
            encoded.append(data)
            kept.append(i)
    decoded = decoder(encoded)
    failures |= {kept[place]: reason for place, reason in decoded.failures.items()}
    return LoadedBatch(
        [kept[place] for place in decoded.kept],
        [image_digest(encoded[place]) for place in decoded.kept],
        decoded,
        failures,
    )


def _without(batch: LoadedBatch, finite: list[bool], teacher: LoadedTeacher) -> LoadedBatch:
    """The batch without the images whose scores are not finite."""
    kept = [place for place, good in enumerate(finite) if good]
    if not kept and len(finite) > 1:
        raise TeacherError(
            f"teacher {teacher.info.name} gives no finite scores for a whole batch of images",
            got=f"NaN or infinity, autocast {teacher.info.autocast}",
            remedy="Use autocast float32, or look at std and at the weights.",
        )
    decoded = batch.decoded
    lost = [i for i, good in zip(batch.positions, finite, strict=True) if not good]
    return LoadedBatch(
        [batch.positions[place] for place in kept],
        [batch.digests[place] for place in kept],
        Decoded(decoded.pixels[kept], decoded.sizes[kept], kept, {}),
        batch.failures | dict.fromkeys(lost, "the teacher's scores are not finite"),
    )


def _rows(
    task: ShardTask, batch: LoadedBatch, maps: EncodedMaps, plan: Plan, config: LabelerConfig, crop_pct: float
) -> ShardRows:
    sizes = batch.decoded.sizes
    tail = bool(plan.meta.tail)
    region = [teacher_region(height, width, config.teacher.view, crop_pct) for height, width in sizes.tolist()]
    return ShardRows(
        scores=maps.scores,
        background=maps.background,
        classes=store_classes(maps.classes, plan.meta.num_classes),
        region=np.array(region, np.float32),
        image_size=sizes.astype(np.uint32),
        target=np.array([task.targets[i] for i in batch.positions], np.int32),
        image_digest=np.array(batch.digests, np.uint64),
        keys=tuple(task.keys[i] for i in batch.positions),
        tail_classes=store_classes(maps.tail_classes, plan.meta.num_classes) if tail else None,
        tail_offsets=maps.tail_offsets if tail else None,
    )


def _join(parts: list[ShardRows], plan: Plan) -> ShardRows:
    """All parts as one, also where there is none."""
    arrays = {}
    for name in plan.layout.keys() - {"key", "checksum", "code_values"}:
        dtype, shape = plan.layout[name]
        arrays[name] = np.concatenate([np.zeros((0, *shape), dtype), *(getattr(part, name) for part in parts)])
    return ShardRows(**arrays, keys=tuple(key for part in parts for key in part.keys))


def _add_stats(stats: dict[str, float], maps: EncodedMaps, predicted: np.ndarray, target: np.ndarray) -> None:
    for name in SUMS:
        stats[name] += float(getattr(maps, name).sum(dtype=np.float64))
    compared = np.isfinite(maps.reference_kl)
    stats["reference_kl"] += float(maps.reference_kl[compared].sum(dtype=np.float64))
    stats["compared_kl"] += float(maps.kl[compared].sum(dtype=np.float64))
    stats["known"] += int((target >= 0).sum())
    stats["agree"] += int((predicted == target).sum())
