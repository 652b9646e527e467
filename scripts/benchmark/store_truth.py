"""The label store against the reference's one file per image: bytes, truth, and the speed of random reads.

Truth is the KL divergence from the teacher's distribution to what is read back, mean over cells, on synthetic maps of
three levels of sureness (see `synthetic_maps`).

Legend: B images; C classes; P palette size; H×W map grid.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labeler.score_maps import EncodedMaps
from labeler.store import LabelStore
from labeler.writer import begin_store, finish_store
from scripts.benchmark.measure import Case, Options, Result, take_turns
from scripts.benchmark.synthetic_maps import (
    BATCH,
    Setting,
    encode,
    join,
    make_plan,
    rival_log_p,
    rival_reader,
    rival_tensor,
    synthetic_logits,
    write_synthetic_shard,
)

SETTINGS = (
    Setting(),
    Setting(steps=(0.10, -3.0, 0.30)),
    Setting(steps=None),
    Setting(palette=16),
    Setting(palette=32),
)
MIDDLE = 6.0
LEVELS = (8.0, MIDDLE, 5.0)  # of an image's strongest class: its cells' first class has 55 %, 43 %, 32 % on average
SHARD_SIZE = 500
RIVAL = "one .pt per image, top 5 of each cell"
LOAD = "one .pt per image, torch.load"
RAM, COMPRESSED, FILES = 'store, cache="ram"', 'store, cache="ram-compressed"', "store, from its files"


@dataclass(frozen=True)
class Level:
    """What one level of sureness gave: mean probability of a cell's first class; side -> figure of the others.

    kl in nats; top1: share of the cells whose first class is the teacher's.
    """

    sure: float
    bytes: Mapping[str, float]
    kl: Mapping[str, float]
    top1: Mapping[str, float]


def run(options: Options) -> Result:
    images, cases = (200 if options.quick else 1000), []
    for top in (MIDDLE,) if options.quick else LEVELS:
        print(f"store: {images:,} maps, strongest class at {top:g}", file=sys.stderr)
        folder = options.scratch / f"level-{top:g}"
        folder.mkdir()
        cases += level_cases(measure_level(images, top, folder), images, 1 / 0.70 if top == MIDDLE else None)
        if top == MIDDLE:
            cases.append(read_speed(folder, images, rounds=options.rounds(9)))
        shutil.rmtree(folder)
    return Result(cases)


def measure_level(images: int, top: float, folder: Path, settings: tuple[Setting, ...] = SETTINGS) -> Level:
    """Each setting's store and the rival's files of the same maps, left in `folder` as "store0" … and "rival"."""
    import torch

    generator = torch.Generator().manual_seed(0)
    parts: list[list[EncodedMaps]] = [[] for _ in settings]
    agree: list[list[float]] = [[] for _ in settings]
    rival_kl, sure = [], []
    (folder / "rival").mkdir()
    for start in range(0, images, BATCH):
        logits = synthetic_logits(min(BATCH, images - start), generator, top)
        log_p = logits.log_softmax(1)
        rival_kl += (log_p.exp() * (log_p - rival_log_p(logits))).sum(1).mean((1, 2)).tolist()
        sure.append(float(log_p.amax(1).exp().mean()))
        for i, one in enumerate(logits):
            torch.save(rival_tensor(one), folder / "rival" / f"{start + i}.pt")
        for setting, part, agreed in zip(settings, parts, agree, strict=True):
            part.append(encode(logits, setting))
            agreed += (cell_top1(part[-1]) == logits.argmax(1).numpy()).mean((1, 2)).tolist()
    for i, (setting, part) in enumerate(zip(settings, parts, strict=True)):
        write_store(folder / f"store{i}", setting, join(part))
    names = [*map(str, settings), RIVAL]
    folders = [*(folder / f"store{i}" for i in range(len(settings))), folder / "rival"]
    kl = [*(float(join(part).kl.mean()) for part in parts), statistics.fmean(rival_kl)]
    return Level(
        sure=statistics.fmean(sure),
        bytes={name: folder_bytes(path) / images for name, path in zip(names, folders, strict=True)},
        kl=dict(zip(names, kl, strict=True)),
        # The rival's five stand in their order in its file, so that its first is the teacher's.
        top1={**{name: statistics.fmean(a) for name, a in zip(names, agree, strict=False)}, RIVAL: 1.0},
    )


def write_store(path: Path, setting: Setting, maps: EncodedMaps) -> None:
    plan = begin_store(path, make_plan(setting, len(maps.classes), SHARD_SIZE))
    for shard in range(plan.meta.shards):
        write_synthetic_shard(path, plan, shard, maps)
    finish_store(path, plan)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def cell_top1(maps: EncodedMaps) -> np.ndarray:
    """int64 [B, H, W]: class of each cell as stored; equal codes go by the palette's order, 0 is surest."""
    coded = maps.scores.dtype == np.uint8
    place = (maps.scores.argmin(1) if coded else maps.scores.argmax(1))[:, None]
    return np.take_along_axis(maps.classes[:, :, None, None], place, axis=1)[:, 0]


def level_cases(level: Level, images: int, sought_kl: float | None) -> list[Case]:
    about = f"teacher's first class at {level.sure:.0%}"
    maps = f"{images:,} synthetic maps of 1,000 classes, 18×18 cells"
    return [
        Case(
            f"bytes per image, {about}", "bytes", one_round(level.bytes),
            note=f"{maps}; all files counted, each to its last byte; sought: at most 2,200",
        ),
        Case(
            f"KL from the teacher, {about}", "nats", one_round(level.kl),
            sought={RIVAL: sought_kl} if sought_kl else {}, note=f"{maps}; mean over their cells",
        ),
        Case(
            f"cells whose first class is kept, {about}", "%",
            one_round({name: 100 * value for name, value in level.top1.items()}), more_is_better=True, note=maps,
        ),
    ]  # fmt: skip


def one_round(figures: Mapping[str, float]) -> dict[str, list[float]]:
    return {name: [value] for name, value in figures.items()}


def read_speed(folder: Path, images: int, rows: int = 2000, rounds: int = 7) -> Case:
    """Random rows of the store and of the rival's files that `measure_level` left in `folder`."""
    path, files = folder / "store0", folder / "rival"
    ways: dict[str, Callable[[np.ndarray], Any]] = {
        RAM: LabelStore(path, cache="ram", trusted=True).read,
        COMPRESSED: LabelStore(path, cache="ram-compressed", trusted=True).read,
        FILES: LabelStore(path, trusted=True).read,
        LOAD: rival_reader(lambda row: files / f"{row}.pt"),
    }
    sides = {name: random_rows(read, images, rows, batch=100) for name, read in ways.items()}
    return Case(
        "random rows, batches of 100", "µs/row", take_turns(sides, rounds), sought={LOAD: 5.0},
        note=f"{images:,} images in the page cache; the store's rows are checked and decoded to float32, "
        "the files are tensors as they lie",
    )  # fmt: skip


def random_rows(read: Callable[[np.ndarray], Any], total: int, rows: int, batch: int) -> Callable[[], float]:
    """A side: µs per row; sides of equal arguments are asked for the same rows, round by round."""
    generator = np.random.default_rng(0)

    def side() -> float:
        wanted = generator.integers(0, total, (-(-rows // batch), batch))
        started = time.perf_counter()
        for part in wanted:
            read(part)
        return (time.perf_counter() - started) / wanted.size * 1e6

    return side
