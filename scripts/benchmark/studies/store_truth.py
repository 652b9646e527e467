"""The label store against the reference's one file per image, on synthetic maps: bytes, error, and random reads.

The error is the KL divergence from the teacher's distribution to the stored one, mean over cells, on maps of three
levels of confidence (see `synthetic_maps`). `store_real` measures maps of a real teacher.

Legend: B images; C classes; H×W map grid.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labeler.store.label_store import LabelStore
from labeler.store.score_code import QUALITIES, Encoding
from scripts.benchmark.inputs.synthetic_maps import (
    BATCH,
    CLASSES,
    FORMAT_1,
    Setting,
    encode,
    join,
    rival_log_p,
    rival_reader,
    rival_tensor,
    synthetic_logits,
    write_store,
)
from scripts.benchmark.measure import Case, Options, Result, take_turns

if TYPE_CHECKING:
    import torch

    from labeler.store.encoder import EncodedMaps

SETTINGS = (
    Setting(),
    Setting("store, high", QUALITIES["high"]),
    Setting("store, float16, 8 dense planes", Encoding(palette=8, precision="float16")),
    FORMAT_1,
)
SAMPLE = 24  # maps on which an encoding is fitted
FITTED = "store, fitted to the bytes of format 1.0"
MIDDLE = 6.0
LEVELS = (8.0, MIDDLE, 5.0)  # of an image's strongest class: its cells' first class has 55 %, 43 %, 32 % on average
RIVAL = "one .pt per image, top 5 of each cell"
LOAD = "one .pt per image, torch.load"
RAM, COMPRESSED, FILES = 'store, cache="ram"', 'store, cache="ram-compressed"', "store, from its files"
CODES = f"{RAM}, not decoded, as the loader reads"


@dataclass(frozen=True)
class Level:
    """The result of one level of confidence.

    Attributes:
        sure: Mean probability of a cell's first class.
        bytes: Side -> bytes per image.
        kl: Side -> KL in nats.
        top1: Side -> share of the cells whose first class is the teacher's.
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
        settings = (*SETTINGS, at_bytes_of_format_1(top))
        level = measure_level(images, top, folder, settings)
        cases += level_cases(level, images, 1 / 0.70 if top == MIDDLE else None)
        if top == MIDDLE:
            cases.append(read_speed(folder, images, rounds=options.rounds(9)))
        shutil.rmtree(folder)
    return Result(cases)


def at_bytes_of_format_1(top: float) -> Setting:
    """Returns the setting whose rows take as many bytes as those of format 1.0, as `--bytes-per-image` finds it."""
    import torch

    from labeler.choose_encoding import row_bytes

    logits = synthetic_logits(SAMPLE, torch.Generator().manual_seed(0), top)
    return Setting(FITTED, fitted(logits, row_bytes(encode(logits, FORMAT_1), CLASSES, FORMAT_1.encoding)))


def fitted(logits: torch.Tensor, wanted: float) -> Encoding:
    """Returns the most accurate encoding of at most `wanted` bytes a row, as `fit_encoding` finds it."""
    from labeler.choose_encoding import LEVELS, fit_threshold

    found = [fit_threshold(logits, Encoding(levels=levels), wanted) for levels in LEVELS]
    return min(found, key=lambda cost: (cost.bytes > wanted, cost.kl)).encoding


def measure_level(images: int, top: float, folder: Path, settings: tuple[Setting, ...] = SETTINGS) -> Level:
    """Writes a store with each setting and the rival's files to `folder`, as "store0" … and "rival"; compares them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    parts: list[list[EncodedMaps]] = [[] for _ in settings]
    rival_kl, sure = [], []
    (folder / "rival").mkdir()
    for start in range(0, images, BATCH):
        logits = synthetic_logits(min(BATCH, images - start), generator, top)
        log_p = logits.log_softmax(1)
        rival_kl += (log_p.exp() * (log_p - rival_log_p(logits))).sum(1).mean((1, 2)).tolist()
        sure.append(float(log_p.amax(1).exp().mean()))
        for i, one in enumerate(logits):
            torch.save(rival_tensor(one), folder / "rival" / f"{start + i}.pt")
        for setting, part in zip(settings, parts, strict=True):
            part.append(encode(logits, setting))
    joined = [join(part) for part in parts]
    for i, (setting, maps) in enumerate(zip(settings, joined, strict=True)):
        write_store(folder / f"store{i}", setting, maps)
    names = [*map(str, settings), RIVAL]
    folders = [*(folder / f"store{i}" for i in range(len(settings))), folder / "rival"]
    # The rival's file keeps the order of its five classes, so its first class is the teacher's.
    top1 = [*(float(maps.first_kept.mean()) for maps in joined), 1.0]
    kl = [*(float(maps.kl.mean()) for maps in joined), statistics.fmean(rival_kl)]
    return Level(
        sure=statistics.fmean(sure),
        bytes={name: folder_bytes(path) / images for name, path in zip(names, folders, strict=True)},
        kl=dict(zip(names, kl, strict=True)),
        top1=dict(zip(names, top1, strict=True)),
    )


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def level_cases(level: Level, images: int, sought_kl: float | None) -> list[Case]:
    about = f"teacher's first class at {level.sure:.0%}"
    maps = f"{images:,} synthetic maps of 1,000 classes, 18×18 cells"
    return [
        Case(
            f"bytes per image, {about}", "bytes", one_round(level.bytes),
            note=f"{maps}; all files counted, each to its last byte",
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
    """Times random reads of the store and of the rival's files that `measure_level` wrote to `folder`."""
    path, files = folder / "store0", folder / "rival"
    held = LabelStore(path, cache="ram", trusted=True)
    ways: dict[str, Callable[[np.ndarray], Any]] = {
        CODES: lambda rows: held.read_codes(rows, trim=True),
        RAM: held.read,
        COMPRESSED: LabelStore(path, cache="ram-compressed", trusted=True).read,
        FILES: LabelStore(path, trusted=True).read,
        LOAD: rival_reader(lambda row: files / f"{row}.pt"),
    }
    sides = {name: random_rows(read, images, rows, batch=100) for name, read in ways.items()}
    return Case(
        "random rows, batches of 100", "µs/row", take_turns(sides, rounds), sought={LOAD: 5.0},
        note=f"{images:,} images in the page cache; the store's rows are checked, and decoded to "
        "float32 where nothing else is said; "
        "the files are tensors as they lie",
    )  # fmt: skip


def random_rows(read: Callable[[np.ndarray], Any], total: int, rows: int, batch: int) -> Callable[[], float]:
    """Returns a side in µs per row; sides with equal arguments read the same rows in each round."""
    generator = np.random.default_rng(0)

    def side() -> float:
        wanted = generator.integers(0, total, (-(-rows // batch), batch))
        started = time.perf_counter()
        for part in wanted:
            read(part)
        return (time.perf_counter() - started) / wanted.size * 1e6

    return side
