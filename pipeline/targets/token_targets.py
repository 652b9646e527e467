"""Targets of a batch, sparse over the classes.

Legend: B images; C classes; P palette size; R tail size; h×w token grid, T = h·w.

A target is the softmax over P palette scores, R scores of the tail (the background's and an offset) and C − P − R
copies of the background score, for each token and for the whole crop. Unused palette and tail places (class −1) count
as nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from labeler.base.errors import InputError
from labeler.store.score_maps import dense_shares

# exp of this is 0 in every float type: the score of all classes that a known label excludes.
NOTHING = -1e4


@dataclass(frozen=True)
class TokenTargets:
    """Targets of a batch, sparse over the classes.

    Attributes:
        classes: int64 [B, P]: class ids of the palette; −1 where a slot is unused.
        token_scores: float32 [B, P, T]: score of each palette class in each token, in row-major order.
        token_background: float32 [B, T]: score of every other class.
        cls_scores: float32 [B, P]: score of each palette class for the whole crop.
        cls_background: float32 [B]: score of every other class for the whole crop.
        tail_classes: int64 [B, R]: classes that share the background; −1 where unused; None: no tail.
        tail_offsets: float32 [B, R]: nats that such a class is above the background, in all tokens and in the crop.
        grid: h, w of the tokens; None: not known. Only mixing needs it.
        num_classes: C; None: not known.
    """

    classes: torch.Tensor
    token_scores: torch.Tensor
    token_background: torch.Tensor
    cls_scores: torch.Tensor
    cls_background: torch.Tensor
    tail_classes: torch.Tensor = None  # type: ignore[assignment]
    tail_offsets: torch.Tensor = None  # type: ignore[assignment]
    grid: tuple[int, int] | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if (self.tail_classes is None) != (self.tail_offsets is None):
            raise InputError("a tail needs classes and offsets", got="only one of them", expected="both, or neither")
        if self.tail_classes is None:
            object.__setattr__(self, "tail_classes", self.classes[:, :0])
            object.__setattr__(self, "tail_offsets", self.cls_scores[:, :0])

    def __len__(self) -> int:
        return self.classes.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all tensors by their names."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def dense_tokens(self, num_classes: int | None = None) -> torch.Tensor:
        """Returns float32 [B, T, C]: each token's distribution.

        It is the plain reference for code that avoids building it.

        Args:
            num_classes: C; None: as the targets know it.
        """
        return self._dense(self.token_scores, self.token_background, num_classes)

    def dense_cls(self, num_classes: int | None = None) -> torch.Tensor:
        """Returns float32 [B, C]: the distribution of the whole crop; `num_classes`: as above."""
        return self._dense(self.cls_scores[..., None], self.cls_background[:, None], num_classes)[:, 0]

    def _dense(self, scores: torch.Tensor, background: torch.Tensor, num_classes: int | None) -> torch.Tensor:
        """Expands palette scores [B, P, T] and background [B, T] to distributions [B, T, C]."""
        num_classes = num_classes or self.num_classes
        if num_classes is None:
            raise InputError("these targets do not know how many classes there are", remedy="Give num_classes.")
        # Over dim 1, as in the published code: float32 rounds differently along the last one (2e-5 at C = 1000).
        offsets = self.tail_offsets.to(scores.dtype)
        shares = dense_shares(self.classes, scores, background, self.tail_classes, offsets, num_classes)
        return shares.transpose(1, 2)

    def tempered(self, temperature: float) -> TokenTargets:
        """Returns targets with scores divided by `temperature`: above 1 softer than the teacher, below 1 sharper."""
        names = ("token_scores", "token_background", "cls_scores", "cls_background", "tail_offsets")
        return dataclasses.replace(self, **{name: getattr(self, name) / temperature for name in names})

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> TokenTargets:
        """Returns the targets on `device`."""
        return self.each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenTargets:
        """Returns the targets in pinned memory, for `DataLoader(pin_memory=True)`."""
        return self.each(lambda part: part.pin_memory())

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TokenTargets:
        """Returns targets with `change` applied to each tensor; grid and number of classes stay."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **changed)


def label_targets(labels: torch.Tensor, tokens: int | tuple[int, int]) -> TokenTargets:
    """Creates targets with the image's true class in every token and for the whole crop.

    Args:
        labels: int64 [B]: true classes, none negative.
        tokens: h, w of their grid, or T alone.

    Returns:
        The targets. They do not know C: the labels at hand say only how many classes there are at least.
    """
    n, grid = len(labels), None if isinstance(tokens, int) else tokens
    count = tokens if isinstance(tokens, int) else tokens[0] * tokens[1]
    scores = torch.zeros(n, 1, count, device=labels.device)
    excluded = torch.full((n, count), NOTHING, device=labels.device)
    whole = scores[:, :, 0], excluded[:, 0]
    return TokenTargets(labels[:, None], scores, excluded, *whole, grid=grid)
