"""Synthetic score maps of any confidence, and stores and rival files made of them.

Synthetic maps have 1,000 classes on an 18×18 grid: smooth fields per class (standard deviation 0.5 at their knots),
eight strong classes per image, noise of 0.15 per cell. How well a few planes represent a map depends on its confidence.

The rival are the reference's files: the five largest logits of each cell and their ids as float16 [2, 5, H, W], one
`.pt` file per image. When they are read, every other class has logit 0.

Functions import torch themselves, so that the memory of a process that only reads a store is that of reading.

Legend: B, N images; n rows of a shard; C classes; P palette size; H×W map grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labeler.store.plan import FORMAT_VERSION, Plan, StoreMeta
from labeler.store.row_schema import ShardRows, encoded_columns
from labeler.store.score_code import FLOOR, NUM_CODES, QUALITIES, Encoding, code_table
from labeler.store.shard_writer import begin_store, finish_store, write_shard

if TYPE_CHECKING:
    import torch

    from labeler.store.encoder import EncodedMaps

CLASSES, MAP = 1000, 18  # C, and H = W, of all benchmarks without a real teacher
BATCH = 50  # images whose dense logits are held at once: 65 MB
SHARD_SIZE = 500
# Format 1.0's dense planes: steps of 0.06 nat down to −3, of 0.25 below.
FINE, KNEE, COARSE = 0.06, -3.0, 0.25


@dataclass(frozen=True)
class Setting:
    """How maps are stored; `format_1`: as in format 1.0, `encoding.palette` dense planes of codes without a tail."""

    name: str = "store, default"
    encoding: Encoding = QUALITIES["default"]
    format_1: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def table(self) -> np.ndarray | None:
        """The score of each code; None: float16."""
        if self.format_1:
            values = np.concatenate([np.arange(0, -KNEE - FINE / 2, FINE), np.arange(-KNEE, -FLOOR + 0.1, COARSE)])
            return np.pad(0 - values, (0, NUM_CODES - len(values)), mode="edge").astype(np.float32)
        return code_table(self.encoding.levels) if self.encoding.precision == "uint8" else None


FORMAT_1 = Setting("store, format 1.0, 8 dense planes", Encoding(palette=8, tail=0), format_1=True)


def synthetic_logits(images: int, generator: torch.Generator, top: float) -> torch.Tensor:
    """Returns logits [B, C, H, W]; `top`: level of the strongest of an image's eight strong classes."""
    import torch
    from torch.nn.functional import interpolate

    def smooth(channels: int, points: int) -> torch.Tensor:
        coarse = torch.randn(images, channels, points, points, generator=generator)
        return interpolate(coarse, (MAP, MAP), mode="bicubic", align_corners=False)

    logits = 0.5 * smooth(CLASSES, 4)
    strong = torch.stack([torch.randperm(CLASSES, generator=generator)[:8] for _ in range(images)])
    peaks = torch.linspace(top, top - 3, 8)[None, :, None, None] + 2 * smooth(8, 3)
    logits.scatter_add_(1, strong[:, :, None, None].expand(-1, -1, MAP, MAP), peaks)
    return logits + 0.15 * torch.randn(logits.shape, generator=generator)


def encode(logits: torch.Tensor, setting: Setting) -> EncodedMaps:
    from labeler.store.encoder import encode_maps, encode_planes

    if setting.format_1:
        return encode_planes(logits, setting.encoding.palette, setting.table)
    return encode_maps(logits, setting.encoding)


def join(parts: list[EncodedMaps]) -> EncodedMaps:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return type(parts[0])(*map(np.concatenate, columns))


def rival_tensor(logits: torch.Tensor) -> torch.Tensor:
    """Returns the rival's file of one image's logits [C, H, W]: float16 [2, 5, H, W], values and ids."""
    import torch

    values, ids = logits.topk(5, dim=0)
    return torch.stack([values.half(), ids.half()])


def rival_log_p(logits: torch.Tensor) -> torch.Tensor:
    """Returns log-probabilities from the rival's files of logits [B, C, H, W]: five per cell, logit 0 elsewhere."""
    values, ids = logits.topk(5, dim=1)
    return logits.new_zeros(logits.shape).scatter_(1, ids, values.half().float()).log_softmax(1)


def rival_reader(path_of: Callable[[int], Path]) -> Callable[[np.ndarray], list[torch.Tensor]]:
    """Returns a function that reads the rival's files of rows."""
    import torch

    return lambda rows: [torch.load(path_of(row), weights_only=True) for row in rows.tolist()]


def key_of(row: int) -> str:
    """Returns a key like ImageNet's; keys are sorted like the rows."""
    folder = f"n{row // 1000:08d}"
    return f"{folder}/{folder}_{row:08d}.JPEG"


def make_plan(setting: Setting, rows: int, shard_size: int, grid: tuple[int, int] = (MAP, MAP)) -> Plan:
    encoding = setting.encoding
    palette, tail = encoding.places(CLASSES)
    meta = StoreMeta(
        num_classes=CLASSES,
        class_names=(),
        palette=palette,
        tail=tail,
        grid=grid,
        score_kind="logprob",
        precision=encoding.precision,
        orientation="exif",
        teacher={"name": "synthetic"},
        dataset_fingerprint="0" * 64,
        num_images=rows,
        shards=-(-rows // shard_size),
        format_version="1.0" if setting.format_1 else FORMAT_VERSION,
    )
    codes = () if setting.table is None else tuple(setting.table.tolist())
    settings = {"levels": encoding.levels, "threshold": encoding.threshold}
    return Plan(meta, settings, shard_size, key_bytes=len(key_of(rows - 1)), code_values=codes)


def write_store(path: Path, setting: Setting, maps: EncodedMaps) -> None:
    """Writes a complete store of these maps."""
    plan = begin_store(path, make_plan(setting, len(maps.classes), SHARD_SIZE, maps.scores.shape[2:]))
    for shard in range(plan.meta.shards):
        write_synthetic_shard(path, plan, shard, maps)
    finish_store(path)


def write_synthetic_shard(store: Path, plan: Plan, shard: int, maps: EncodedMaps) -> None:
    """Commits one shard of a store whose rows repeat `maps`; the other columns are random."""
    part = plan.slice_of(shard)
    n, repeated = part.stop - part.start, np.arange(part.start, part.stop) % len(maps.classes)
    generator = np.random.default_rng(shard)
    keys = tuple(map(key_of, range(part.start, part.stop)))
    rows = ShardRows(
        **{name: array[repeated] for name, array in encoded_columns(maps, CLASSES).items()},
        region=np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1)),
        image_size=generator.integers(200, 600, (n, 2)).astype(np.uint32),
        target=generator.integers(0, CLASSES, n).astype(np.int32),
        image_digest=generator.integers(0, 2**64, n, dtype=np.uint64),
        keys=keys,
    )
    write_shard(store, plan, shard, rows, [], {}, keys)
