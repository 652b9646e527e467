"""What the two backends share: what they are given, what they return, and how a bad image is named.

Legend: B images; S input side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from labeler.decode_reference import open_rgb
from labeler.errors import IntegrityError
from labeler.score_maps import ScoreMaps
from pipeline.config import LoaderConfig
from pipeline.draws import Draws
from pipeline.label_rows import HostRows
from pipeline.sources import unreadable
from pipeline.targets import TokenTargets


@dataclass(frozen=True)
class Prepared:
    """A batch before any decoding.

    samples int64 [B]; their keys; sizes int64 [B, 2], height and width that each must decode to; the encoded files;
    what is drawn for them; their label rows if any
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


def decoding_failed(batches: Iterable[Prepared], orientation: str, error: Exception) -> IntegrityError:
    """The error that names the image that a decoder failed on; where PIL decodes all of them, the batch's images."""
    batches = list(batches)
    for batch in batches:
        for key, data in zip(batch.keys, batch.encoded, strict=True):
            try:
                open_rgb(data, orientation)
            except Exception as reason:  # PIL's decoders raise many types
                return unreadable(key, f"it cannot be decoded: {reason}")
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if any(word in line for word in ("ailed", "ailure", "not valid"))]
    keys = ", ".join(repr(key) for batch in batches for key in batch.keys[:4])
    return IntegrityError(
        "a batch cannot be decoded",
        got=(told or lines)[0],
        remedy=f'It is one with {keys} …; backend="reference" tells more.',
    )
