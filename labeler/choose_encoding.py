"""Chooses the encoding of a store: as set, or the most accurate for a number of bytes per image, found on a sample.

Legend: n sampled images; C classes; H×W map grid.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from labeler.base.errors import InputError
from labeler.config import LabelerConfig
from labeler.sources.decoding.check_header import check_header
from labeler.sources.image_source import BadImage, ImageSource
from labeler.store.hdf5.build_shard import build_shard
from labeler.store.row_schema import ShardRows, encoded_columns, row_layout
from labeler.store.score_code import QUALITIES, Encoding, code_table

if TYPE_CHECKING:
    from torch import Tensor

    from labeler.store.encoder import EncodedMaps

SAMPLE = 64  # images
LEVELS = (12, 16, 20, 24, 32, 48)
FINEST, COARSEST, STEPS = 1e-6, 0.5, 10  # range of thresholds, and steps of the bisection of their ratio
KEY_BYTES = 40  # of a sampled row's key: about ImageNet's

log = logging.getLogger("labeler")


@dataclass(frozen=True)
class Cost:
    """The cost of an encoding, measured on a sample.

    Attributes:
        encoding: The encoding.
        bytes: Bytes of a row.
        kl: KL(teacher ‖ store) in nats, mean over cells and images.
        reference_kl: The same for the reference's files.
        first_kept: Share of cells whose most probable class is kept.
    """

    encoding: Encoding
    bytes: float
    kl: float
    reference_kl: float
    first_kept: float


def asked_encoding(config: LabelerConfig) -> Encoding:
    """Returns the encoding of the settings: that of the quality, with the settings that override it."""
    names = ("palette", "tail", "levels", "threshold", "precision")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return dataclasses.replace(QUALITIES[config.quality], **given)


def fit_encoding(config: LabelerConfig, images: ImageSource, device: str) -> Encoding:
    """Finds the most accurate encoding of at most `config.bytes_per_image` bytes, on a sample of the images.

    Args:
        config: Settings of the run.
        images: The images.
        device: Device of the teacher.

    Returns:
        The encoding.

    Raises:
        InputError: No encoding is that small.
    """
    wanted = config.bytes_per_image
    assert wanted is not None
    logits = sample_logits(config, images, device)
    asked = asked_encoding(config)
    levels = tqdm((config.levels,) if config.levels else LEVELS, "bytes per image", disable=not config.progress)
    costs = [fit_threshold(logits, dataclasses.replace(asked, levels=k), wanted) for k in levels]
    best = min(costs, key=lambda cost: (cost.bytes > wanted, cost.kl))
    if best.bytes > wanted:
        smallest = min(cost.bytes for cost in costs)
        raise InputError(
            "the maps of this teacher do not fit into so few bytes", got=f"`bytes_per_image={config.bytes_per_image}`",
            expected=f"at least {smallest:,.0f}", remedy="Give more bytes, or a smaller `input_size`.",
        )  # fmt: skip
    log.info(
        "%d levels, threshold %.2g: %.0f bytes per image, KL %.3f", best.encoding.levels, best.encoding.threshold,
        best.bytes, best.kl,
    )  # fmt: skip
    return best.encoding


def fit_threshold(logits: Tensor, encoding: Encoding, wanted: float) -> Cost:
    """Finds the smallest threshold whose rows take at most `wanted` bytes, or the largest threshold."""
    low, high = FINEST, COARSEST
    finest = measure(logits, dataclasses.replace(encoding, threshold=low))
    if finest.bytes <= wanted:
        return finest
    best = measure(logits, dataclasses.replace(encoding, threshold=high))
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        cost = measure(logits, dataclasses.replace(encoding, threshold=float(f"{middle:.3g}")))
        if cost.bytes > wanted:
            low = middle
        else:
            high, best = middle, cost
    return best


def measure(logits: Tensor, encoding: Encoding) -> Cost:
    """Measures the cost of an encoding on maps [n, C, H, W]: bytes of a row and KL."""
    from labeler.store.encoder import encode_maps

    maps = encode_maps(logits, encoding)
    compared = np.isfinite(maps.reference_kl)
    return Cost(
        encoding,
        row_bytes(maps, logits.shape[1], encoding),
        float(maps.kl.mean()),
        float(maps.reference_kl[compared].mean() * maps.kl.mean() / maps.kl[compared].mean()),
        float(maps.first_kept.mean()),
    )


def row_bytes(maps: EncodedMaps, num_classes: int, encoding: Encoding) -> float:
    """Returns the bytes of a row in a shard of these maps, without what an empty shard takes."""
    n, palette, *grid = maps.scores.shape
    layout = row_layout(
        palette, (grid[0], grid[1]), num_classes, "logprob", encoding.precision, KEY_BYTES, maps.tail_classes.shape[1]
    )
    table = code_table(encoding.levels) if encoding.precision == "uint8" else None
    random = np.random.default_rng(0)
    rows = ShardRows(
        **encoded_columns(maps, num_classes),
        region=np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1)),
        image_size=random.integers(200, 600, (n, 2)).astype(np.uint32),
        target=random.integers(0, num_classes, (n,)).astype(np.int32),
        image_digest=random.integers(0, 2**64, (n,), dtype=np.uint64),
        keys=tuple(f"n{i // 100:08d}/n{i // 100:08d}_{i:08d}.JPEG" for i in range(n)),
    )

    def size(count: int) -> int:
        return len(build_shard(rows.first(count), layout, {}, table))

    return (size(n) - size(1)) / (n - 1) if n > 1 else float(size(1) - size(0))


def sample_logits(config: LabelerConfig, images: ImageSource, device: str, count: int = SAMPLE) -> Tensor:
    """Returns float32 [n, C, H, W]: maps of up to `count` random images that can be labeled; on the CPU."""
    import torch

    from labeler.teacher.create_teacher import create_teacher
    from labeler.worker import decoder_for

    teacher = create_teacher(config.teacher, device)
    decoder = decoder_for(teacher, config, device, config.threads or torch.get_num_threads())
    parts: list[Tensor] = []
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    while order and sum(map(len, parts)) < count:
        batch, order = order[: config.batch_size], order[config.batch_size :]
        encoded = []
        for i in batch:
            try:
                data = images.read(i)
                check_header(data, config.min_side, config.max_pixels)
                encoded.append(data)
            except BadImage:
                continue
        decoded = decoder(encoded)
        if decoded.kept:
            logits = teacher.label(decoded.pixels)
            parts.append(logits[logits.isfinite().all(1).flatten(1).all(1)].cpu())
    if not sum(map(len, parts)):
        raise InputError(
            "none of the images can be labeled", got=f"{len(images)} images", expected="at least one, for a sample"
        )
    return torch.cat(parts)[:count]
