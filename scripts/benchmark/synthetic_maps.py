"""Synthetic score maps, as sure of their classes as one likes, and stores and rival files made of them.

Maps have 1,000 classes on an 18×18 grid: smooth fields per class (standard deviation 0.5 at their knots), eight strong
classes an image, noise of 0.15 per cell. How much a few planes can say depends on how sure the teacher is.

The rival is the reference's way: the five largest logits of each cell and their ids as float16 [2, 5, H, W], in one
`.pt` file per image; its training takes every other class for logit 0.

Torch is loaded where it is needed only, so that a process that just reads a store shows what reading takes.

Legend: B, N images; n rows of a shard; C classes; P palette size; H×W map grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labeler.plan import Plan, StoreMeta
from labeler.score_maps import EncodedMaps, code_table, encode_palette
from labeler.shard_file import ShardRows
from labeler.writer import store_classes, write_shard

if TYPE_CHECKING:
    import torch

CLASSES, MAP = 1000, 18  # C, and H = W, of all benchmarks
FLOOR = -20.0
BATCH = 50  # images whose dense logits are held at once: 65 MB


@dataclass(frozen=True)
class Setting:
    """How maps are stored: the palette, and the fine step, knee and coarse step of its codes; None: float16."""

    palette: int = 8
    steps: tuple[float, float, float] | None = (0.06, -3.0, 0.25)

    def __str__(self) -> str:
        steps = "float16" if self.steps is None else f"steps of {self.steps[0]} and {self.steps[2]} nat"
        return f"store, palette {self.palette}, {steps}"

    @property
    def table(self) -> np.ndarray | None:
        return None if self.steps is None else code_table(*self.steps, FLOOR)


def synthetic_logits(images: int, generator: torch.Generator, top: float) -> torch.Tensor:
    """[B, C, H, W]; `top`: level of the strongest of an image's eight strong classes."""
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
    return encode_palette(logits, setting.palette, setting.table, FLOOR)


def join(parts: list[EncodedMaps]) -> EncodedMaps:
    names = ("classes", "scores", "background", "kl", "coverage", "entropy")
    return EncodedMaps(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def rival_tensor(logits: torch.Tensor) -> torch.Tensor:
    """What the rival keeps of one image's logits [C, H, W]: float16 [2, 5, H, W], values and ids."""
    import torch

    values, ids = logits.topk(5, dim=0)
    return torch.stack([values.half(), ids.half()])


def rival_log_p(logits: torch.Tensor) -> torch.Tensor:
    """What the rival's training reads back of logits [B, C, H, W]: five float16 logits per cell, 0 elsewhere."""
    values, ids = logits.topk(5, dim=1)
    return logits.new_zeros(logits.shape).scatter_(1, ids, values.half().float()).log_softmax(1)


def rival_reader(path_of: Callable[[int], Path]) -> Callable[[np.ndarray], list[torch.Tensor]]:
    """Reads the rival's files of many rows."""
    import torch

    return lambda rows: [torch.load(path_of(row), weights_only=True) for row in rows.tolist()]


def key_of(row: int) -> str:
    """As ImageNet's, sorted as the rows are."""
    folder = f"n{row // 1000:08d}"
    return f"{folder}/{folder}_{row:08d}.JPEG"


def make_plan(setting: Setting, rows: int, shard_size: int) -> Plan:
    meta = StoreMeta(
        num_classes=CLASSES,
        class_names=(),
        palette=setting.palette,
        grid=(MAP, MAP),
        score_kind="logprob",
        precision="float16" if setting.table is None else "uint8",
        orientation="exif",
        teacher={"name": "synthetic"},
        dataset_fingerprint="0" * 64,
        num_images=rows,
        shards=-(-rows // shard_size),
    )
    codes = () if setting.table is None else tuple(setting.table.tolist())
    return Plan(meta, {}, shard_size, key_bytes=len(key_of(rows - 1)), code_values=codes)


def write_synthetic_shard(store: Path, plan: Plan, shard: int, maps: EncodedMaps) -> None:
    """Commit one shard of a store whose rows go through `maps` again and again, all else of a row being its own."""
    part = plan.slice_of(shard)
    n, repeated = part.stop - part.start, np.arange(part.start, part.stop) % len(maps.classes)
    generator = np.random.default_rng(shard)
    keys = tuple(map(key_of, range(part.start, part.stop)))
    rows = ShardRows(
        scores=maps.scores[repeated],
        background=maps.background[repeated],
        classes=store_classes(maps.classes[repeated], CLASSES),
        region=np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1)),
        image_size=generator.integers(200, 600, (n, 2)).astype(np.uint32),
        target=generator.integers(0, CLASSES, n).astype(np.int32),
        image_digest=generator.integers(0, 2**64, n, dtype=np.uint64),
        keys=keys,
    )
    write_shard(store, plan, shard, rows, [], {}, keys)
