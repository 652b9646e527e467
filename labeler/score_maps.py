"""Score maps as a palette of class planes: the encoder, the code table and the decoded form.

Legend: B, N images; C classes; P palette size; H×W map grid.

A cell's teacher distribution is the softmax over its P palette scores and C − P copies of one background score. Unused
palette places (class −1) count as nothing: neither as palette nor among the other classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from labeler.errors import InputError

if TYPE_CHECKING:
    import torch

NUM_CODES = 256


@dataclass(frozen=True)
class ScoreMaps:
    """Decoded label maps of N images, as numpy arrays or (after `to_torch`) as tensors.

    classes     int64   [N, P]        class ids, largest share first; −1 where the place is unused
    scores      float32 [N, P, H, W]  log-probabilities (or logits, in a `logit` store)
    background  float32 [N, H, W]     score of each class that is not in the palette
    region      float32 [N, 4]        y0, x0, y1, x1 of the image part that the map covers, fractions of the image
    """

    classes: Any
    scores: Any
    background: Any
    region: Any
    num_classes: int

    def __len__(self) -> int:
        return self.classes.shape[0]

    def dense(self) -> Any:
        """float32 [N, C, H, W]: each cell's distribution over all classes."""
        n, _, height, width = self.scores.shape
        shape = (n, self.num_classes, height, width)
        image, place = (self.classes >= 0).nonzero(as_tuple=True) if _is_tensor(self.scores) else self._used()
        if _is_tensor(self.scores):
            logits = self.background[:, None].expand(shape).clone()
            logits[image, self.classes[image, place]] = self.scores[image, place]
            return logits.softmax(1)
        logits = np.broadcast_to(self.background[:, None], shape).copy()
        logits[image, self.classes[image, place]] = self.scores[image, place]
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    def top1(self) -> np.ndarray:
        """int64 [N, H, W]: the palette's most probable class of each cell."""
        scores = np.where((self.classes >= 0)[:, :, None, None], self.scores, -np.inf)
        place = scores.argmax(1)
        return np.take_along_axis(self.classes[:, :, None, None], place[:, None], axis=1)[:, 0]

    def to_torch(self, device: str | torch.device = "cpu") -> ScoreMaps:
        """The same maps as tensors on `device`."""
        import torch

        classes, scores, background, region = (
            torch.as_tensor(a, device=device) for a in (self.classes, self.scores, self.background, self.region)
        )
        return ScoreMaps(classes, scores, background, region, self.num_classes)

    def _used(self) -> tuple[np.ndarray, np.ndarray]:
        image, place = np.nonzero(self.classes >= 0)
        return image, place


def _is_tensor(array: object) -> bool:
    return not isinstance(array, np.ndarray)


def code_table(fine_step: float, knee: float, coarse_step: float, floor: float) -> np.ndarray:
    """float32 [256], falling: the score of each uint8 code.

    Steps of `fine_step` nat from 0 down to `knee`, of `coarse_step` from there to `floor`, which the rest repeats.
    Probabilities are what a loss sees, so precision is spent where they are large.
    """
    if not (fine_step > 0 and coarse_step > 0 and floor < knee < 0):
        raise InputError(
            "the code table's settings do not fit together",
            got=f"fine step {fine_step}, knee {knee}, coarse step {coarse_step}, floor {floor}",
            expected="positive steps and floor < knee < 0",
        )
    fine = np.arange(0.0, -knee - fine_step / 2, fine_step)
    coarse = np.arange(-knee, -floor + coarse_step / 2, coarse_step)
    values = 0.0 - np.concatenate([fine, coarse])
    if len(values) > NUM_CODES:
        raise InputError(
            "the code table is too fine",
            got=f"{len(values)} codes",
            expected=f"at most {NUM_CODES}",
            remedy="Use larger --fine-step or --coarse-step, or a higher --score-floor.",
        )
    return np.pad(values, (0, NUM_CODES - len(values)), mode="edge").astype(np.float32)


@dataclass(frozen=True)
class EncodedMaps:
    """One batch as it is stored, with what the coding cost; arrays on the CPU.

    classes int64 [B, P] (−1 unused); scores uint8 or float16 [B, P, H, W]; background likewise [B, H, W];
    kl float32 [B]: mean over cells of KL(teacher ‖ store), nats; coverage float32 [B]: probability in the palette;
    entropy float32 [B]: mean entropy of the teacher's cells, nats.
    """

    classes: np.ndarray
    scores: np.ndarray
    background: np.ndarray
    kl: np.ndarray
    coverage: np.ndarray
    entropy: np.ndarray


def encode_palette(logits: torch.Tensor, palette: int, table: np.ndarray | None, floor: float) -> EncodedMaps:
    """Teacher logits [B, C, H, W] to palettes of at most `palette` classes, on the logits' device.

    table   float32 [256] from `code_table`: store uint8 codes; None: store float16 scores
    floor   scores are cut there; a class that is nowhere above it is left to the background
    """
    import torch

    # Softmax copies are dense over the classes: keep them to about 256 MB, whatever the class count.
    images = max(1, 16_000_000 // logits[0].numel())
    values = None if table is None else torch.from_numpy(table).to(logits.device)
    parts = [_encode(chunk.float(), palette, values, floor) for chunk in logits.split(images)]
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    return EncodedMaps(*columns)


def _encode(logits: torch.Tensor, palette: int, table: torch.Tensor | None, floor: float) -> tuple[torch.Tensor, ...]:
    """Chunk of `encode_palette`, in the order of `EncodedMaps`'s fields."""
    import torch

    num_images, num_classes = logits.shape[:2]
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    # A stable sort settles ties by class id, so equal inputs give equal palettes everywhere.
    order = p.mean((2, 3)).sort(dim=1, descending=True, stable=True).indices[:, :palette]
    cells = order[:, :, None, None].expand(-1, -1, *logits.shape[2:])
    scores = log_p.gather(1, cells)
    used = scores.amax((2, 3)) > floor
    shown = used[:, :, None, None]
    chosen_p = p.gather(1, cells) * shown
    # Summing what is left loses nothing; 1 − sum(chosen) would, where the palette holds almost everything.
    left = p.scatter(1, cells, p.gather(1, cells) * ~shown).sum(1)
    others = num_classes - used.sum(1)[:, None, None]
    background = (left / others.clamp(min=1)).log().clamp(min=floor)

    classes = order.masked_fill(~used, -1)
    scores = scores.clamp(min=floor).masked_fill(~shown, floor)
    stored, stored_background = _quantise(scores, table), _quantise(background, table)
    if table is not None:
        stored = _keep_first(stored, scores)
    read, read_background = _restore(stored, table), _restore(stored_background, table)
    total = (read.exp() * shown).sum(1) + others * read_background.exp()
    cross = (chosen_p * read).sum(1) + left * read_background - total.log()
    kl = (-entropy - cross).mean((1, 2))

    missing = palette - order.shape[1]
    if missing > 0:  # fewer classes than places
        classes = torch.nn.functional.pad(classes, (0, missing), value=-1)
        unused = _quantise(torch.full((num_images, missing, *scores.shape[2:]), floor, device=logits.device), table)
        stored = torch.cat([stored, unused], 1)
    return classes, stored, stored_background, kl, 1 - left.mean((1, 2)), entropy.mean((1, 2))


def _quantise(scores: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """Scores to the nearest code of a falling table, or to float16."""
    import torch

    if table is None:
        return scores.half()
    # Codes that repeat the floor are never written: the first of them stands for all.
    codes = int((table > table[-1]).sum()) + 1
    midpoints = -(table[1:codes] + table[: codes - 1]) / 2
    return torch.bucketize(-scores, midpoints).to(torch.uint8)


def _keep_first(codes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Codes [B, P, H, W] in which rounding never ties a cell's first class with another: the other goes a step down."""
    import torch

    first = scores.argmax(1, keepdim=True)
    tied = (codes == codes.gather(1, first)).scatter(1, first, False)
    return torch.where(tied & (codes < NUM_CODES - 1), codes + 1, codes)


def _restore(stored: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    return stored.float() if table is None else table[stored.long()]
