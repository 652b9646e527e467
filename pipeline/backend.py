"""What the two backends share: what they are given, what they return, and how a bad image is named.

Legend: B images; S input side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from labeler.base.errors import IntegrityError
from labeler.sources.pixels import open_rgb
from labeler.store.score_maps import ScoreMaps
from pipeline.augment.draws import Draws
from pipeline.config import LoaderConfig
from pipeline.labels.label_rows import HostRows
from pipeline.labels.targets import TokenTargets
from pipeline.sources import unreadable

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prepared:
    """A batch before any decoding.

    samples int64 [B]; their keys; sizes int64 [B, 2], height and width that each must decode to; the encoded files,
    as the backend's decoder takes them; what is drawn for them; their label rows if any
    """

    samples: np.ndarray
    keys: tuple[str, ...]
    sizes: np.ndarray
    encoded: list[bytes]
    draws: Draws
    rows: HostRows | None


class LoaderBackend:
    """Turns prepared batches into images, cropped, resized, flipped, augmented, normalised, and maps into targets."""

    name: str

    def __init__(
        self, config: LoaderConfig, orientation: str, vouched: bool, augments: bool, device: torch.device, threads: int
    ) -> None:
        """vouched: the labeler has decoded every image in full; augments: kernels or affine maps may be drawn."""
        self.config, self.orientation, self.vouched, self.augments = config, orientation, vouched, augments
        self.device, self.threads = device, threads
        shape = (1, 3, 1, 1)
        self._scale = (1 / (255 * torch.tensor(config.std, dtype=torch.float32, device=device))).view(shape)
        self._mean = (255 * torch.tensor(config.mean, dtype=torch.float32, device=device)).view(shape)
        # What a warp uncovers gets the mean colour: zero after normalisation.
        self.fill = tuple(min(255, round(255 * channel)) for channel in config.mean)

    def encoded(self, data: bytes, key: str, size: np.ndarray) -> bytes:
        """What the decoder is given of a file that must decode to `size`, int64 [2]; called in many threads."""
        return data

    def decode(self, data: bytes, key: str, size: np.ndarray) -> Image:
        """PIL's RGB image. Raises IntegrityError where there is none, or one of another size."""
        try:
            image = open_rgb(data, self.orientation)
        except Exception as reason:  # PIL's decoders raise many types
            raise unreadable(self._path(key), f"it cannot be decoded: {reason}") from None
        if (image.height, image.width) != tuple(size.tolist()):
            got = f"{image.height}×{image.width} pixels instead of {size[0]}×{size[1]}"
            raise unreadable(self._path(key), got, "Label it again, or leave it out.")
        return image

    def _path(self, key: str) -> str:
        return str(Path(self.config.images) / key)

    def images(self, prepared: Iterator[Prepared]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        """Normalised float32 [B, 3, S, S] on the device for each prepared batch, in order."""
        raise NotImplementedError

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] to float32."""
        return torch.sub(pixels, self._mean).mul_(self._scale)

    def targets(self, maps: ScoreMaps, draws: Draws) -> TokenTargets:
        """The part of each map that its image shows."""
        raise NotImplementedError


def decoding_failed(batches: Iterable[Prepared], error: Exception) -> IntegrityError:
    """The error where a decoder fails on a batch and on none of its images alone."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if any(word in line for word in ("ailed", "ailure", "not valid"))]
    keys = ", ".join(repr(key) for batch in batches for key in batch.keys[:4])
    return IntegrityError(
        "a batch cannot be decoded",
        got=(told or lines)[0],
        remedy=f'It is one with {keys} …; backend="reference" tells more.',
    )
