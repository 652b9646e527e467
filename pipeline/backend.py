"""What the two backends share: what they are given, what they return, and how a bad image is named.

Legend: B images; S input side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from labeler.decode_reference import open_rgb
from labeler.score_maps import ScoreMaps
from pipeline.config import LoaderConfig
from pipeline.draws import Draws
from pipeline.label_rows import HostRows
from pipeline.sources import unreadable
from pipeline.targets import TokenTargets


@dataclass(frozen=True)
class Prepared:
    """A batch before any decoding: samples int64 [B], their keys and encoded files, and their label rows if any."""

    samples: np.ndarray
    keys: tuple[str, ...]
    encoded: list[bytes]
    draws: Draws
    rows: HostRows | None


class LoaderBackend:
    """Turns prepared batches into images, cropped, resized, flipped, augmented, normalised, and maps into targets."""

    name: str

    def __init__(
        self, config: LoaderConfig, orientation: str, augments: bool, device: torch.device, threads: int
    ) -> None:
        self.config, self.orientation, self.augments = config, orientation, augments
        self.device, self.threads = device, threads
        shape = (1, 3, 1, 1)
        self._scale = (1 / (255 * torch.tensor(config.std))).view(shape).to(device)
        self._mean = (255 * torch.tensor(config.mean)).view(shape).to(device)
        # What a warp uncovers gets the mean colour: zero after normalisation.
        self.fill = tuple(min(255, round(255 * channel)) for channel in config.mean)

    def images(self, prepared: Iterator[Prepared]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        """Normalised float32 [B, 3, S, S] on the device for each prepared batch, in order."""
        raise NotImplementedError

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] to float32."""
        return torch.sub(pixels, self._mean).mul_(self._scale)

    def targets(self, maps: ScoreMaps, draws: Draws) -> TokenTargets:
        """The part of each map that its image shows."""
        raise NotImplementedError


def find_culprit(batches: Iterable[Prepared], orientation: str, error: Exception) -> None:
    """Raise IntegrityError naming the image that a decoder failed on; return where none is to blame."""
    for batch in batches:
        for key, data in zip(batch.keys, batch.encoded, strict=True):
            try:
                open_rgb(data, orientation)
            except Exception as reason:  # PIL's decoders raise many types
                raise unreadable(key, f"it cannot be decoded: {reason}") from error
