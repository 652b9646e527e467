"""The label store on the maps of a real teacher: its bytes, and its error relative to the reference's files.

The teacher labels photographs at three input sizes. The maps are written to a store with each setting and read back.
The error is the KL divergence from the teacher, over the cells of the map and over the tokens of random crops, where
the pipeline averages the scores of both sides before the softmax. The reference keeps five float16 logits of each cell;
every other class has logit 0.

Legend: n images; C classes; H×W map grid; T tokens.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labeler.base.errors import TokenLabelError
from labeler.store.score_code import QUALITIES
from scripts.benchmark.inputs.synthetic_maps import (
    FORMAT_1,
    Setting,
    encode,
    join,
    rival_log_p,
    rival_tensor,
    write_store,
)
from scripts.benchmark.measure import Case, Curves, Options, Result
from scripts.benchmark.studies.store_truth import RIVAL, SAMPLE, fitted, folder_bytes

if TYPE_CHECKING:
    from torch import Tensor

SIZES = (260, 448, 576)  # pixels
BYTES = (750, 1400, 2200)  # of a row, as --bytes-per-image fits them
IMAGES, QUICK_IMAGES, BATCH = 150, 24, 25
NAME, GRID = "maps of a real teacher", (14, 14)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
CELLS, TOKENS, SHARE = "in cells", "on tokens of random crops", "share of the reference's"
# Measured with a prototype before the format was implemented: side of the map -> mark -> bytes of a
# row, share of the reference's KL in cells and on tokens.
PROTOTYPE = {
    14: {"levels 16, no tail": (1457, 0.67, 0.73), "levels 16, tail 128": (1707, 0.56, 0.59),
         "levels 24, tail 128": (2753, 0.47, 0.48)},
    18: {"levels 16, no tail": (2207, 0.68, 0.75), "levels 16, tail 128": (2456, 0.57, 0.61),
         "levels 24, tail 128": (4240, 0.49, 0.52)},
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The result of one setting.

    Attributes:
        row: Bytes of an image's row.
        files: Bytes of all files, per image.
        cells: KL from the teacher over cells, as a share of the reference's.
        tokens: The same over tokens of random crops.
        first: Share of the cells whose first class is kept.
    """

    row: float
    files: float
    cells: float
    tokens: float
    first: float


class Truth:
    """The teacher's maps [n, C, H, W] and a random crop of each, to compare other scores with."""

    def __init__(self, logits: Tensor) -> None:
        from pipeline.augment.crops import random_resized_crops

        # Sides without a common factor with a map's: with bins of whole cells, rounding would decide the sample count.
        sizes = np.tile([3749, 4999], (len(logits), 1))
        windows = random_resized_crops(sizes, SCALE, RATIO, np.random.default_rng(0))
        self.logits, self.boxes = logits, windows / np.tile(sizes, (1, 2))
        self.cells, self.tokens = self._kl(rival_log_p)

    def shares(self, scores: np.ndarray | Tensor) -> tuple[float, float]:
        """Returns the KL of scores [n, C, H, W] over cells and over tokens, as shares of the reference's."""
        import torch

        parts = iter(torch.as_tensor(scores).split(BATCH))
        cells, tokens = self._kl(lambda _: next(parts))
        return cells / self.cells, tokens / self.tokens

    def _kl(self, scores_of: Any) -> tuple[float, float]:
        """Returns the mean KL over cells and over tokens, from the teacher to `scores_of` a batch of logits."""
        found = []
        for start in range(0, len(self.logits), BATCH):
            logits, boxes = self.logits[start : start + BATCH], self.boxes[start : start + BATCH]
            log_p, other = logits.log_softmax(1), scores_of(logits)
            pairs = (log_p, other.log_softmax(1)), (tokens_of(log_p, boxes), tokens_of(other, boxes))
            kl = [(p.exp() * (p - q)).sum(1).flatten(1).mean(1) for p, q in pairs]
            found += [(float(cells), float(tokens)) for cells, tokens in zip(*kl, strict=True)]
        cells, tokens = np.mean(found, 0)
        return float(cells), float(tokens)


def tokens_of(scores: Tensor, boxes: np.ndarray) -> Tensor:
    """Crops scores of all classes [n, C, H, W] to log-probabilities of tokens [n, C, T]."""
    import torch

    from labeler.store.score_maps import ScoreMaps
    from pipeline import crop_score_maps

    n, count = scores.shape[:2]
    every = torch.arange(count).expand(n, count)
    maps = ScoreMaps(every, scores, torch.zeros_like(scores[:, 0]), num_classes=count)
    return crop_score_maps(maps, torch.from_numpy(boxes), GRID).token_scores.log_softmax(1)


def run(options: Options) -> Result:
    if options.drawn:
        return Result(left_out={NAME: "a real teacher needs photographs; give them with --images"})
    cases, curves = [], []
    for size in SIZES[:1] if options.quick else SIZES:
        print(f"store: maps of {options.teacher} at {size} px", file=sys.stderr)
        try:
            logits = teacher_maps(options, size)
        except TokenLabelError as error:
            return Result(left_out={NAME: f"no maps of {options.teacher}: {error.problem}"})
        folder = options.scratch / f"real-{size}"
        folder.mkdir()
        found, rival = measure(logits, folder)
        about = f"{options.teacher} at {size} px, {logits.shape[2]}×{logits.shape[3]} cells"
        cases += size_cases(found, rival, about, f"{len(logits)} photographs")
        curves.append(size_curves(found, about, logits.shape[2]))
    return Result(cases, curves=curves)


def teacher_maps(options: Options, size: int) -> Tensor:
    """Returns float32 [n, C, H, W]. Raises TokenLabelError if the teacher, its weights or the images are missing."""
    from labeler import LabelerConfig, TeacherConfig
    from labeler.choose_encoding import sample_logits
    from labeler.sources.folder_source import find_images

    teacher = TeacherConfig(options.teacher, checkpoint=options.checkpoint, input_size=size)
    config = LabelerConfig(teacher, batch_size=BATCH, threads=options.cores, device=options.device)
    images = find_images(options.images)
    return sample_logits(config, images, options.device, QUICK_IMAGES if options.quick else IMAGES).float()


def settings_for(logits: Tensor) -> tuple[Setting, ...]:
    """Returns the settings, the default first; those with a number of bytes are what `--bytes-per-image` gives."""
    named = [Setting()] + [Setting(f"store, {name}", QUALITIES[name]) for name in ("low", "high")]
    asked = [Setting(f"store, {wanted:,} bytes asked", fitted(logits[:SAMPLE], wanted)) for wanted in BYTES]
    return (*named, *asked, FORMAT_1)


def measure(logits: Tensor, folder: Path) -> tuple[dict[str, Found], Found]:
    """Returns setting -> its result, and the rival's result, whose shares are 1."""
    import torch

    truth = Truth(logits)
    found = {
        str(setting): measure_setting(setting, truth, folder / str(i)) for i, setting in enumerate(settings_for(logits))
    }
    torch.save(rival_tensor(logits[0]), folder / "one.pt")
    size = (folder / "one.pt").stat().st_size
    return found, Found(size, size, 1.0, 1.0, 1.0)


def measure_setting(setting: Setting, truth: Truth, store: Path) -> Found:
    """Writes the maps to a store, reads them back and compares them with the teacher."""
    from labeler.choose_encoding import row_bytes
    from labeler.store.label_store import LabelStore
    from labeler.store.score_maps import dense_scores

    maps = join([encode(part, setting) for part in truth.logits.split(BATCH)])
    write_store(store, setting, maps)
    read = LabelStore(store, trusted=True).read(np.arange(len(truth.logits)))
    parts = read.classes, read.scores, read.background, read.tail_classes, read.tail_offsets
    cells, tokens = truth.shares(dense_scores(*parts, read.num_classes))
    return Found(
        row_bytes(maps, read.num_classes, setting.encoding),
        folder_bytes(store) / len(truth.logits),
        cells,
        tokens,
        float(maps.first_kept.mean()),
    )


def size_cases(found: dict[str, Found], rival: Found, about: str, images: str) -> list[Case]:
    every = found | {RIVAL: rival}

    def values(name: str, times: float = 1) -> dict[str, list[float]]:
        return {side: [times * getattr(one, name)] for side, one in every.items()}

    return [
        Case(f"bytes per image, rows alone, {about}", "bytes", values("row"), note=images),
        Case(f"bytes per image, all files, {about}", "bytes", values("files"),
             note=f"{images}; what a store has once, counts much in one so small"),
        Case(f"KL from the teacher {CELLS}, {about}", SHARE, values("cells"), note=images),
        Case(f"KL from the teacher {TOKENS}, {about}", SHARE, values("tokens"), note=f"{images}; a crop of each"),
        Case(f"cells whose first class is kept, {about}", "%", values("first", 100), more_is_better=True, note=images),
    ]  # fmt: skip


def size_curves(found: dict[str, Found], about: str, side: int) -> Curves:
    new = [one for name, one in found.items() if name != str(FORMAT_1)]
    old = found[str(FORMAT_1)]
    marks = {f"{CELLS}, format 1.0": [(old.row, old.cells)], f"{TOKENS}, format 1.0": [(old.row, old.tokens)]}
    points = PROTOTYPE.get(side, {}).values()
    if points:
        marks[f"{CELLS}, prototype"] = [(size, cells) for size, cells, _ in points]
        marks[f"{TOKENS}, prototype"] = [(size, tokens) for size, _, tokens in points]
    lines = {CELLS: [(one.row, one.cells) for one in new], TOKENS: [(one.row, one.tokens) for one in new]}
    return Curves(about, "bytes of a row", f"KL, {SHARE}", lines, marks)
