"""How scores are coded: the meaning of the 256 codes, and the settings of the encoding.

Maps are encoded in `encoder.py` and decoded here; the loader decodes in `pipeline/compiled/crop_kernels.py`.

Legend: N images; P palette size; H×W map grid.

The KL divergence of a small error d in a probability p is about d²/2p, so equal steps in √p spend bits where they
matter to a loss: code k of 1 … levels stands for p = (k / levels)². Code 0 says "as the background in this cell". The
codes above `levels` are for the background only: 0, −0.25, −0.5 … nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from labeler.base.errors import InputError

if TYPE_CHECKING:
    import torch

LEAST_KL = 1e-5  # nats per cell; less is rounding
NUM_CODES = 256
BACKGROUND_STEP, FLOOR = 0.25, -20.0  # nats
OFFSET_STEP = 0.25  # nats between the offsets of a tail, which are stored as whole numbers of steps
MAX_OFFSET = 31  # nats that a tail class may be above or below the background
IMAGES_AT_A_TIME = 8
MIN_LEVELS, MAX_LEVELS = 4, NUM_CODES - 2 - round(-FLOOR / BACKGROUND_STEP)


@dataclass(frozen=True)
class Encoding:
    """How maps become rows of a store.

    Attributes:
        palette: P, the most classes that get their own score plane.
        tail: R, the most classes that share the background plane, each with an offset.
        levels: Quantization steps of √p. More are more accurate and larger.
        threshold: Nats of KL, summed over the cells of a map, that each stored byte must save, for a map of one cell;
            it grows with the number of cells to the power 0.12. Smaller is more accurate and larger.
        precision: "uint8": codes; "float16": P dense planes of scores, of the classes with the largest share, without
            threshold or tail.
    """

    palette: int = 64
    tail: int = 192
    levels: int = 20
    threshold: float = 2.1e-3
    precision: str = "uint8"

    def __post_init__(self) -> None:
        if not MIN_LEVELS <= self.levels <= MAX_LEVELS:
            expected = f"{MIN_LEVELS} to {MAX_LEVELS}"
            raise InputError("the number of levels is out of range", got=self.levels, expected=expected)
        if not 0 <= self.threshold < 1:
            raise InputError("the threshold is out of range", got=self.threshold, expected="0 ≤ threshold < 1")
        if self.tail < 0:
            raise InputError("the tail must be a number of classes", got=self.tail, expected="0 (no tail) or more")

    def places(self, num_classes: int) -> tuple[int, int]:
        """Returns (P, R) of a store of `num_classes` classes, neither more than the number of classes."""
        tail = 0 if self.precision == "float16" else min(self.tail, max(0, num_classes - 1))
        return min(self.palette, num_classes), tail


QUALITIES = {
    "low": Encoding(levels=16, threshold=6e-3),
    "default": Encoding(),
    "high": Encoding(palette=128, levels=28, threshold=1e-3),
}


def code_table(levels: int) -> np.ndarray:
    """Returns float32 [256]: the score of each code; for code 0 the floor, for readers that do not know its meaning."""
    own = 2 * np.log(np.arange(1, levels + 1) / levels)
    shared = np.arange(0, FLOOR - BACKGROUND_STEP / 2, -BACKGROUND_STEP)
    values = np.concatenate([[FLOOR], own, shared])
    return np.pad(values, (0, NUM_CODES - len(values)), constant_values=FLOOR).astype(np.float32)


@dataclass(frozen=True)
class ScoreCode:
    """The meaning of the stored numbers of a store.

    Attributes:
        values: float32 [256]: the score of each uint8 code; None: scores are stored as they are.
        as_background: Whether code 0 in a palette plane stands for the background's score (format 2.0).
        levels: Quantization steps of √p, to encode; 0: not known, or the codes are no such steps.
    """

    values: np.ndarray | None
    as_background: bool
    levels: int = 0
    _tables: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of_roots(cls, levels: int) -> ScoreCode:
        """Returns the code of format 2.0."""
        return cls(code_table(levels), True, levels)

    def decode(self, scores: Any, background: Any | None) -> tuple[Any, Any]:
        """Decodes stored planes, arrays or tensors; both ways give the same numbers, bit for bit.

        Args:
            scores: Palette planes [N, P, H, W], uint8 or float16.
            background: Background planes [N, H, W]; None: 0 everywhere.

        Returns:
            (scores, background), float32 of the same shapes.
        """
        return (self._decode_arrays if isinstance(scores, np.ndarray) else self._decode_tensors)(scores, background)

    @staticmethod
    def decode_offsets(offsets: Any) -> Any:
        """Decodes the stored offsets of a tail, an array or a tensor, to nats."""
        if isinstance(offsets, np.ndarray):
            return offsets.astype(np.float32) * np.float32(OFFSET_STEP)
        return offsets.float() * OFFSET_STEP

    def root_codes(self, p: torch.Tensor) -> torch.Tensor:
        """Returns the nearest codes of probabilities, as floats; 0 has no probability of its own."""
        return (p.sqrt() * self.levels).round().clamp(max=self.levels)

    def root_probabilities(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the probabilities that codes of `root_codes` stand for."""
        return (codes / self.levels) ** 2

    def root_scores(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the scores that codes of `root_codes` stand for; for code 0, which has none, that of code 1."""
        return 2 * (codes.clamp(min=1) / self.levels).log()

    def background_codes(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the nearest codes of a background's scores, uint8, and the scores that they stand for."""
        import torch

        steps = (-scores / BACKGROUND_STEP).round().clamp(0, -FLOOR / BACKGROUND_STEP)
        return (steps + self.levels + 1).to(torch.uint8), -BACKGROUND_STEP * steps

    def nearest(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns the nearest codes of scores in a table that falls, as that of format 1.0; without a table float16."""
        import torch

        if self.values is None:
            return scores.half()
        # Of the codes that repeat the floor only the first is written.
        table = self._table(scores.device)[: int((self.values > self.values[-1]).sum()) + 1]
        return torch.bucketize(-scores, -(table[1:] + table[:-1]) / 2).to(torch.uint8)

    def _decode_arrays(self, scores: np.ndarray, background: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        def look_up(stored: np.ndarray) -> np.ndarray:
            return stored.astype(np.float32) if self.values is None else self.values[stored]

        shape = (len(scores), *scores.shape[2:])
        shared = np.zeros(shape, np.float32) if background is None else look_up(background)
        decoded = look_up(scores)
        if self.as_background:
            np.copyto(decoded, shared[:, None], where=scores == 0)
        return decoded, shared

    def _decode_tensors(
        self, scores: torch.Tensor, background: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if self.values is None:
            zeros = scores.new_zeros((len(scores), *scores.shape[2:]), dtype=torch.float32)
            return scores.float(), zeros if background is None else background.float()
        table = self._table(scores.device)
        # An int32 index takes half the bytes of an int64 index.
        shared = table.new_zeros((len(scores), *scores.shape[2:])) if background is None else table[background.int()]
        decoded = torch.empty(scores.shape, dtype=table.dtype, device=scores.device)
        # A few images at a time on a CPU, so that they stay in its cache between the operations.
        step = max(1, len(scores) if scores.is_cuda else IMAGES_AT_A_TIME)
        for start in range(0, len(scores), step):
            part = slice(start, start + step)
            torch.index_select(table, 0, scores[part].reshape(-1).int(), out=decoded[part].view(-1))
            if self.as_background:
                torch.where(scores[part] == 0, shared[part, None], decoded[part], out=decoded[part])
        return decoded, shared

    def _table(self, device: torch.device) -> torch.Tensor:
        """Returns `values` on a device; copied once, since a copy to a GPU waits for it."""
        import torch

        if device not in self._tables:
            self._tables[device] = torch.from_numpy(self.values).to(device)
        return self._tables[device]


def share_of_reference(compared_kl: float, reference_kl: float, rows: int) -> float | None:
    """Returns the KL of labels relative to that of the reference's files for the same maps.

    Args:
        compared_kl: Sum of the KL of labels over rows, in nats.
        reference_kl: The same sum for the reference's files.
        rows: Number of rows.

    Returns:
        The ratio; None if the reference loses only rounding, as with five or fewer classes, of which it keeps all.
    """
    return compared_kl / reference_kl if reference_kl > LEAST_KL * max(1, rows) else None
