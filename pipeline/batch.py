"""What a loader yields.

Legend: B images; S input side; P palette size; T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.geometry import Views
from pipeline.mix import MixBox
from pipeline.targets import TokenTargets


@dataclass(frozen=True)
class Batch:
    """Images with the targets of their tokens.

    images   float32 [B, 3, S, S], normalised
    targets  of every image's own tokens, mixed or not: token b takes its partner's (image B−1−b) inside `mix`
    labels   int64 [B]: true classes, −1 where not known
    mix      the box of tokens that are mixed, None where nothing is
    mixed_pixels  images show their partners inside the box already; otherwise the model mixes its tokens
    keys     B image keys; rows int64 [B]: their rows in the label store, −1 without one
    views    what each input shows of its image
    """

    images: torch.Tensor
    targets: TokenTargets
    labels: torch.Tensor
    mix: MixBox | None
    keys: tuple[str, ...]
    rows: np.ndarray
    views: Views
    mixed_pixels: bool = False

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def token_mix(self) -> MixBox | None:
        """The box that the model has still to apply to its tokens: `model(batch.images, mix=batch.token_mix)`."""
        return None if self.mixed_pixels else self.mix
