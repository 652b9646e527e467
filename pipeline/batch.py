"""The batch that a loader yields, and that any training loop gives to the loss.

Legend: B images; S input side; P palette size; T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from labeler.base.errors import InputError
from pipeline.augment.mix import MixBox
from pipeline.geometry import Views, identity
from pipeline.targets.token_targets import TokenTargets


@dataclass(frozen=True)
class Batch:
    """Images with the targets of their tokens: `Batch(images, targets, labels)`; the rest has defaults.

    Attributes:
        images: float32 [B, 3, S, S], normalized.
        targets: Targets of every image's own tokens, mixed or not. Inside of `mix`, image b takes the targets of its
            partner, image B−1−b.
        labels: int64 [B]: true classes, −1 where not known.
        mix: The box of tokens that are mixed; None: no mixing.
        keys: B image keys; None: all empty.
        rows: int64 [B]: rows in the label store; None: −1, without a store.
        views: The part of its image that each input shows; None: all of it.
        mixed_pixels: Whether the pixels inside of the box are mixed already; otherwise the model mixes its tokens.
        masks: uint8 [B, S, S]: the class of each pixel; None: there are no masks.
    """

    images: torch.Tensor
    targets: TokenTargets
    labels: torch.Tensor
    mix: MixBox | None = None
    keys: tuple[str, ...] = None  # type: ignore[assignment]
    rows: np.ndarray = None  # type: ignore[assignment]
    views: Views = None  # type: ignore[assignment]
    mixed_pixels: bool = False
    masks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self)
        if len(self.targets) != n or len(self.labels) != n:
            raise InputError(
                "a batch needs one target and one label for each image",
                got=f"{n} images, {len(self.targets)} targets, {len(self.labels)} labels",
                remedy="Use −1 for labels that are not known.",
            )
        if self.keys is None:
            object.__setattr__(self, "keys", ("",) * n)
        if self.rows is None:
            object.__setattr__(self, "rows", np.full(n, -1))
        if self.views is None:
            whole = torch.tensor([[0, 0, 1, 1]], dtype=torch.float64, device="cpu")
            object.__setattr__(self, "views", Views(whole.repeat(n, 1), identity(n)))

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def token_mix(self) -> MixBox | None:
        """The box in which the model must mix its tokens, or None: `model(batch.images, mix=batch.token_mix)`."""
        return None if self.mixed_pixels else self.mix

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Batch:
        """Returns the batch with images, targets and labels on `device`; keys, rows and views stay on the host."""
        return self._moved(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Returns the batch with images, targets and labels in pinned memory, for `DataLoader(pin_memory=True)`."""
        return self._moved(lambda part: part.pin_memory())

    def _moved(self, move: Callable) -> Batch:
        """Applies `move` to images, targets, labels and masks."""
        masks = None if self.masks is None else move(self.masks)
        return replace(
            self, images=move(self.images), targets=move(self.targets), labels=move(self.labels), masks=masks
        )
