"""Size, truth and reading speed of the label store, against the reference's one file per image.

    python -m scripts.benchmark_store [--images 2000] [--json]

Maps are synthetic: 1,000 classes on an 18×18 grid, smooth fields per class (standard deviation 0.5 at their knots),
eight strong classes an image, noise of 0.15 per cell. How much eight planes can say depends on how sure the teacher is,
so three levels are shown. The reference keeps the five largest logits of each cell and their ids as float16,
[2, 5, 18, 18], in one `.pt` file per image, and takes every other class for logit 0.

Legend: B images; C classes; H×W map grid.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from labeler.plan import Plan, StoreMeta
from labeler.score_maps import EncodedMaps, code_table, encode_palette
from labeler.shard_file import ShardRows
from labeler.store import LabelStore
from labeler.writer import begin_store, finish_store, store_classes, write_shard

CLASSES, GRID, FLOOR = 1000, 18, -20.0
SETTINGS = (
    # palette, fine step, knee, coarse step; None: float16
    (8, 0.06, -3.0, 0.25),
    (8, 0.10, -3.0, 0.30),
    (8, None, None, None),
    (16, 0.06, -3.0, 0.25),
    (32, 0.06, -3.0, 0.25),
)


def synthetic_logits(images: int, generator: torch.Generator, top: float) -> torch.Tensor:
    """[B, C, H, W]; `top`: level of the strongest of an image's eight strong classes."""

    def smooth(channels: int, points: int) -> torch.Tensor:
        coarse = torch.randn(images, channels, points, points, generator=generator)
        return interpolate(coarse, (GRID, GRID), mode="bicubic", align_corners=False)

    logits = 0.5 * smooth(CLASSES, 4)
    strong = torch.stack([torch.randperm(CLASSES, generator=generator)[:8] for _ in range(images)])
    peaks = torch.linspace(top, top - 3, 8)[None, :, None, None] + 2 * smooth(8, 3)
    logits.scatter_add_(1, strong[:, :, None, None].expand(-1, -1, GRID, GRID), peaks)
    return logits + 0.15 * torch.randn(logits.shape, generator=generator)


def reference_log_p(logits: torch.Tensor) -> torch.Tensor:
    """What the reference's training reads back: five float16 logits per cell, 0 elsewhere."""
    values, ids = logits.topk(5, dim=1)
    return torch.zeros_like(logits).scatter_(1, ids, values.half().float()).log_softmax(1)


def reference_file(logits: torch.Tensor, path: Path) -> None:
    values, ids = logits.topk(5, dim=0)
    torch.save(torch.stack([values.half(), ids.half()]), path)


class StoreBuilder:
    """Fills a store of one setting with synthetic maps, 500 rows a shard."""

    shard_size = 500

    def __init__(self, path: Path, images: int, palette: int, table: np.ndarray | None) -> None:
        self.path, self.images, self.table = path, images, table
        meta = StoreMeta(
            num_classes=CLASSES,
            class_names=(),
            palette=palette,
            grid=(GRID, GRID),
            score_kind="logprob",
            precision="float16" if table is None else "uint8",
            orientation="exif",
            teacher={"name": "synthetic"},
            dataset_fingerprint="0" * 64,
            num_images=images,
            shards=-(-images // self.shard_size),
        )
        codes = () if table is None else tuple(table.tolist())
        self.plan = begin_store(path, Plan(meta, {}, self.shard_size, key_bytes=24, code_values=codes))
        self.rows: list[EncodedMaps] = []
        self.kl: list[float] = []
        self.top1: list[float] = []

    def add(self, logits: torch.Tensor) -> None:
        found = encode_palette(logits, self.plan.meta.palette, self.table, FLOOR)
        self.rows.append(found)
        self.kl += found.kl.tolist()

    def finish(self) -> LabelStore:
        joined = [
            np.concatenate(column)
            for column in zip(*((r.classes, r.scores, r.background) for r in self.rows), strict=True)
        ]
        generator = np.random.default_rng(0)
        for shard in range(self.plan.meta.shards):
            part = self.plan.slice_of(shard)
            n = part.stop - part.start
            sizes = generator.integers(200, 600, (n, 2))
            keys = tuple(f"n{i // 50:08d}/n{i:08d}.JPEG" for i in range(part.start, part.stop))
            rows = ShardRows(
                scores=joined[1][part],
                background=joined[2][part],
                classes=store_classes(joined[0][part], CLASSES),
                region=np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1)),
                image_size=sizes.astype(np.uint32),
                target=generator.integers(0, CLASSES, n).astype(np.int32),
                image_digest=generator.integers(0, 2**63, n).astype(np.uint64),
                keys=keys,
            )
            write_shard(self.path, self.plan, shard, rows, [], {}, keys)
        finish_store(self.path, self.plan)
        return LabelStore(self.path)


def measure(images: int, top: float, folder: Path, settings: tuple[tuple, ...] = SETTINGS) -> tuple[list[dict], float]:
    """(figures of the reference and of each setting on the same maps; mean probability of a cell's first class)."""
    generator = torch.Generator().manual_seed(0)
    builders = []
    for i, (palette, fine, knee, coarse) in enumerate(settings):
        table = None if fine is None else code_table(fine, knee, coarse, FLOOR)
        builders.append(StoreBuilder(folder / f"store{i}", images, palette, table))
    reference_kl, sure, agreement, files = [], [], [[] for _ in builders], folder / "reference"
    files.mkdir()
    for start in range(0, images, 50):
        logits = synthetic_logits(min(50, images - start), generator, top)
        log_p = logits.log_softmax(1)
        reference_kl += (log_p.exp() * (log_p - reference_log_p(logits))).sum(1).mean((1, 2)).tolist()
        sure.append(float(log_p.amax(1).exp().mean()))
        for i, one in enumerate(logits):
            reference_file(one, files / f"{start + i}.pt")
        for builder, agree in zip(builders, agreement, strict=True):
            builder.add(logits)
            agree += [cell_top1(builder, builder.rows[-1]) == logits.argmax(1).numpy()]
    base = statistics.fmean(reference_kl)
    size = sum(file.stat().st_size for file in files.iterdir()) / images
    rival = "top-5 float16, one .pt per image"
    table_rows = [{"store": rival, "bytes": size, "kl": base, "kl_ratio": 1.0, "top1": 1.0}]
    for (palette, fine, knee, coarse), builder, agree in zip(settings, builders, agreement, strict=True):
        builder.finish()
        size = sum(file.stat().st_size for file in builder.path.iterdir()) / images
        name = f"palette {palette}, " + ("float16" if fine is None else f"steps {fine} above {knee}, {coarse} below")
        kl = statistics.fmean(builder.kl)
        table_rows.append(
            {
                "store": name,
                "bytes": size,
                "kl": kl,
                "kl_ratio": kl / base,
                "top1": float(np.mean(np.concatenate(agree))),
            }
        )
    return table_rows, statistics.fmean(sure)


def cell_top1(builder: StoreBuilder, found: EncodedMaps) -> np.ndarray:
    """Class of each cell as stored; equal codes are settled by the palette's order."""
    place = (found.scores.argmin(1) if builder.table is not None else found.scores.argmax(1))[:, None]
    return np.take_along_axis(found.classes[:, :, None, None], place, axis=1)[:, 0]


def read_speed(folder: Path, images: int, rows: int = 2000, repeats: int = 7) -> dict[str, float]:
    """Median microseconds per random row, the ways of reading alternating within one run."""
    path, files = folder / "store0", folder / "reference"
    stores = {
        'store, cache="ram"': LabelStore(path, cache="ram"),
        'store, cache="ram-compressed"': LabelStore(path, cache="ram-compressed"),
        "store, from its files": LabelStore(path),
    }
    ways = {name: (lambda wanted, s=store: s.read(wanted)) for name, store in stores.items()}
    ways["torch.load per image"] = lambda wanted: [torch.load(files / f"{i}.pt", weights_only=True) for i in wanted]
    for way in ways.values():
        way(np.arange(min(images, 200)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        wanted = np.random.default_rng(repeat).integers(0, images, rows)
        for name, way in ways.items():
            started = time.perf_counter()
            for batch in np.array_split(wanted, rows // 100):
                way(batch)
            times[name].append((time.perf_counter() - started) / rows * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    results: dict = {"images": options.images, "size": {}}
    for top in (8.0, 6.0, 5.0):
        with tempfile.TemporaryDirectory() as folder:
            rows, sure = measure(options.images, top, Path(folder))
            results["size"][f"teacher's first class has {sure:.0%} on average"] = rows
            if "read_us" not in results:
                results["read_us"] = read_speed(Path(folder), options.images)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for name, rows in results["size"].items():
        print(f"\n{options.images} maps, {name}")
        print(f"{'':58}{'bytes/image':>12}{'KL, nats':>10}{'KL ratio':>10}{'top-1':>8}")
        for row in rows:
            print(f"{row['store']:58}{row['bytes']:12,.0f}{row['kl']:10.4f}{row['kl_ratio']:10.2f}{row['top1']:8.1%}")
    rival = results["read_us"]["torch.load per image"]
    print(f"\n{'random rows, batches of 100':58}{'µs/row':>12}{'times faster':>14}")
    for name, value in results["read_us"].items():
        print(f"{name:58}{value:12.1f}{rival / value:14.1f}")


if __name__ == "__main__":
    main()
