"""Building the targets of a batch: from score maps, and from dense maps as in token labeling's published code.

Both sides get equivalent labels, already mirrored for mirrored images. Our targets need no softmax, which is part of
the loss; the rival's are dense. Extra memory is the peak of one call, each side in a separate process, after a call on
two images has loaded all code: it includes results and temporary tensors, but not inputs and libraries. On a CPU malloc
keeps freed memory on both sides while time is measured.

Rows of a store must be decoded first. That is measured with the default number of planes and with twice as many, with a
tail, on maps of two sizes, with every plane used.

Legend: B images; C classes; P palette size; R tail size; K = 5 classes per cell; H×W map grid; h×w token grid, T = h·w.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torchvision.ops import roi_align

from labeler.base.freed_memory import freed_memory_kept
from labeler.store.label_store import LabelStore
from labeler.store.score_code import Encoding
from labeler.store.score_maps import ScoreMaps
from labeler.store.stored_rows import StoredRows
from pipeline import TokenTargets, crop_score_maps
from pipeline.augment.crops import random_resized_crops
from pipeline.geometry import Views, flips
from pipeline.targets.row_reader import LabelRowReader
from scripts.benchmark.inputs.synthetic_batch import PLACES
from scripts.benchmark.inputs.synthetic_maps import CLASSES, MAP, Setting, write_store
from scripts.benchmark.measure import (
    KEPT,
    Case,
    Options,
    Result,
    alone_on_cpu,
    extra_memory,
    milliseconds,
    note_of,
    take_turns,
)

GRID, TOP, BATCH = (14, 14), 5, 128
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
PALETTES = (8, 32)
SIDES, STORED, TAIL = (9, MAP), (64, 128), PLACES[1]  # H = W, P and R of a store
LEVELS, CODED = 20, 0.25  # of a store; share of its codes that are not "as background", as in a real teacher's maps
TOLERANCE = 1e-4  # between the two sides' probabilities
OURS, RIVAL = "crop_score_maps", "scatter, roi_align, softmax"
WHOLE = "rows decoded and cropped"


def mirrored(top5: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirrors labels [..., H, W] and boxes [..., 4]."""
    y0, x0, y1, x1 = boxes.unbind(-1)
    return top5.flip(-1), torch.stack([y0, 1 - x1, y1, 1 - x0], -1)


def rival_targets(
    top5: torch.Tensor, boxes: torch.Tensor, classes: int, grid: tuple[int, int] = GRID
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns labels [B, 2, K, H, W] and boxes [B, 4] into distributions of tokens [B, C, T] and crops [B, C]."""
    values, ids = top5[:, 0].float(), top5[:, 1].long()
    n, _, height, width = values.shape
    dense = torch.zeros(n, classes, height, width, device=top5.device).scatter_(1, ids, values)
    sides = torch.tensor([width, height, width, height], device=top5.device)
    images = torch.arange(n, device=top5.device)[:, None].float()
    rois = torch.cat([images, boxes.float()[:, [1, 0, 3, 2]] * sides], 1)
    tokens = roi_align(dense, rois, grid, aligned=True).flatten(2).softmax(1)
    return tokens, roi_align(dense, rois, (1, 1), aligned=True).flatten(1).softmax(1)


class TargetInputs:
    """The same scores twice: as a palette of P planes and as the K largest of each cell; random crops and flips.

    An image has P classes in all, so its palette holds every class that its top-5 labels name, and 0 elsewhere.
    """

    def __init__(self, batch: int, palette: int, device: str = "cpu", side: int = MAP) -> None:
        generator = torch.Generator().manual_seed(0)
        classes = torch.stack([torch.randperm(CLASSES, generator=generator)[:palette] for _ in range(batch)])
        values, places = (4 + 2 * torch.randn(batch, palette, side, side, generator=generator)).topk(TOP, dim=1)
        values = values.half()
        scores = torch.zeros(batch, palette, side, side).scatter_(1, places, values.float())
        maps = ScoreMaps(classes, scores, torch.zeros(batch, side, side), num_classes=CLASSES)
        # Sides without a common factor with 18: with bins of whole cells, rounding would decide the sample count.
        sizes = np.tile([3749, 4999], (batch, 1))
        windows = random_resized_crops(sizes, SCALE, RATIO, np.random.default_rng(0))
        boxes = torch.from_numpy(windows / np.tile(sizes, (1, 2)))
        hflip = torch.rand(batch, generator=generator) < 0.5
        top5 = torch.stack([values, classes.gather(1, places.flatten(1)).view_as(places).half()], 1)
        rival_boxes = boxes.clone()
        top5[hflip], rival_boxes[hflip] = mirrored(top5[hflip], boxes[hflip])
        self.maps, self.boxes, self.hflip = maps.to_torch(device), boxes.to(device), hflip.to(device)
        self.top5, self.rival_boxes = top5.to(device), rival_boxes.to(device)

    def ours(self) -> TokenTargets:
        return crop_score_maps(self.maps, self.boxes, GRID, self.hflip)

    def rival(self) -> tuple[torch.Tensor, torch.Tensor]:
        return rival_targets(self.top5, self.rival_boxes, CLASSES)


def largest_difference(inputs: TargetInputs) -> float:
    """Returns the largest difference between the sides' probabilities, of tokens and of whole crops."""
    ours, (tokens, whole) = inputs.ours(), inputs.rival()
    pairs = ((ours.dense_tokens(CLASSES).mT, tokens), (ours.dense_cls(CLASSES), whole))
    return max(float((one - other).abs().max()) for one, other in pairs)


def memory(side: str, palette: int, device: str, cores: int) -> float:
    """Returns the MB that one call of a side ("ours" or "rival") needs; on a CPU, call it in a separate process."""
    torch.set_num_threads(cores)
    getattr(TargetInputs(2, palette, device), side)()
    return extra_memory(getattr(TargetInputs(BATCH, palette, device), side), device)


def run(options: Options) -> Result:
    torch.set_num_threads(options.cores)
    cases = []
    for palette in PALETTES[:1] if options.quick else PALETTES:
        print(f"targets: palette of {palette} …", file=sys.stderr)
        with freed_memory_kept(options.device == "cpu"):
            cases.append(_time(options, palette))
        cases.append(_memory(options, palette))
    for side in SIDES[:1] if options.quick else SIDES:
        for palette in STORED[:1] if options.quick else STORED:
            print(f"targets: rows of {palette} planes, {side}×{side} cells …", file=sys.stderr)
            with freed_memory_kept(options.device == "cpu"):
                cases.append(_stored(options, palette, side))
    return Result(cases)


def stored_rows(folder: Path, batch: int, palette: int, side: int, device: str) -> tuple[LabelRowReader, StoredRows]:
    """A store of random codes as the loader holds it, and rows of it as they are read."""
    random = np.random.default_rng(0)
    classes = np.sort(np.stack([random.permutation(CLASSES)[: palette + TAIL] for _ in range(batch)])[:, :, None], 1)
    coded = random.random((batch, palette, side, side)) < CODED
    maps = SimpleNamespace(
        classes=classes[:, :palette, 0],
        scores=(random.integers(1, LEVELS + 1, coded.shape) * coded).astype(np.uint8),
        background=random.integers(LEVELS + 21, LEVELS + 61, (batch, side, side)).astype(np.uint8),
        tail_classes=classes[:, palette:, 0],
        tail_offsets=random.integers(-8, 9, (batch, TAIL)).astype(np.int8),
    )
    write_store(folder, Setting(encoding=Encoding(palette, TAIL, LEVELS)), maps)
    rows = LabelRowReader(LabelStore(folder, trusted=True), torch.device(device))
    return rows, rows.read(np.arange(batch))


def _stored(options: Options, palette: int, side: int) -> Case:
    rows, host = stored_rows(options.scratch / f"rows-{palette}-{side}", BATCH, palette, side, options.device)
    maps, inputs = rows.decode(host), TargetInputs(BATCH, palette, options.device, side)
    crop = lambda maps: crop_score_maps(maps, inputs.boxes, GRID, inputs.hflip)  # noqa: E731
    views = Views(inputs.boxes, flips(inputs.hflip))
    calls = {WHOLE: lambda: rows.crop(host, views, GRID), OURS: lambda: crop(maps), RIVAL: inputs.rival}
    sides = {name: milliseconds(call, options.device, options.calls) for name, call in calls.items()}
    return Case(
        f"targets of {BATCH} images from a store's rows, {palette} planes of {side}×{side} cells, tail of {TAIL}",
        "ms",
        take_turns(sides, options.rounds(9)),
        sought={RIVAL: 25},
        note=note_of("sought: at most 8 ms on two cores", "all planes are used", KEPT[options.device]),
    )


def _time(options: Options, palette: int) -> Case:
    inputs = TargetInputs(BATCH, palette, options.device)
    difference = largest_difference(inputs)
    if not difference < TOLERANCE:
        raise SystemExit(f"the two sides' targets differ by {difference:.1e}")
    calls = {OURS: inputs.ours, RIVAL: inputs.rival}
    sides = {name: milliseconds(call, options.device, options.calls) for name, call in calls.items()}
    return Case(
        f"targets of {BATCH} images, palette of {palette}",
        "ms",
        take_turns(sides, options.rounds(9)),
        sought={RIVAL: 25},
        note=note_of(
            f"{MAP}×{MAP} cells to {GRID[0]}×{GRID[1]} tokens, {CLASSES:,} classes",
            f"both sides say the same: no probability differs by {TOLERANCE:g} or more",
            KEPT[options.device],
        ),
    )


def _memory(options: Options, palette: int) -> Case:
    def extra(side: str) -> float:
        where = f"{__name__}:memory"
        return float(alone_on_cpu(options.device, where, side, palette, options.device, options.cores))

    sides = {OURS: lambda: extra("ours"), RIVAL: lambda: extra("rival")}
    return Case(
        f"extra memory for the targets of {BATCH} images, palette of {palette}",
        "MB",
        take_turns(sides, options.rounds(3), warmups=0),
        sought={RIVAL: 20},
        note="What a call needs at its peak, its result included.",
    )
