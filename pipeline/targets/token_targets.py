"""Targets of a batch, sparse over the classes.

Legend: B images; C classes; P palette size; R tail size; h×w token grid, T = h·w.

A target is the softmax over P palette scores, R scores of the tail (the background's and an offset) and C − P − R
copies of the background score, for each token and for the whole crop. Unused palette and tail places (class −1) count
as nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields

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
    """

    classes: torch.Tensor
    token_scores: torch.Tensor
    token_background: torch.Tensor
    cls_scores: torch.Tensor
    cls_background: torch.Tensor
    tail_classes: torch.Tensor = None  # type: ignore[assignment]
    tail_offsets: torch.Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if (self.tail_classes is None) != (self.tail_offsets is None):
            raise InputError("a tail needs classes and offsets", got="only one of them", expected="both, or neither")
        if self.tail_classes is None:
            object.__setattr__(self, "tail_classes", self.classes[:, :0])
            object.__setattr__(self, "tail_offsets", self.cls_scores[:, :0])

    def __len__(self) -> int:
        return self.classes.shape[0]

    def dense_tokens(self, num_classes: int) -> torch.Tensor:
        """Returns float32 [B, T, C]: each token's distribution.

        It is the plain reference for code that avoids building it.

        Args:
            num_classes: C.
        """
        return self._dense(self.token_scores, self.token_background, num_classes)

    def dense_cls(self, num_classes: int) -> torch.Tensor:
        """Returns float32 [B, C]: the distribution of the whole crop; `num_classes`: C."""
        return self._dense(self.cls_scores[..., None], self.cls_background[:, None], num_classes)[:, 0]

    def _dense(self, scores: torch.Tensor, background: torch.Tensor, num_classes: int) -> torch.Tensor:
        """Expands palette scores [B, P, T] and background [B, T] to distributions [B, T, C]."""
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
        return TokenTargets(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> TokenTargets:
        """Returns the targets in pinned memory, for `DataLoader(pin_memory=True)`."""
        return TokenTargets(*(getattr(self, f.name).pin_memory() for f in fields(self)))


def label_targets(labels: torch.Tensor, tokens: int) -> TokenTargets:
    """Creates targets with the image's true class in every token and for the whole crop.

    Args:
        labels: int64 [B]: true classes, none negative.
        tokens: T.

    Returns:
        The targets.
    """
    n = len(labels)
    scores = torch.zeros(n, 1, tokens, device=labels.device)
    excluded = torch.full((n, tokens), NOTHING, device=labels.device)
    return TokenTargets(labels[:, None], scores, excluded, scores[:, :, 0], excluded[:, 0])
