"""The interface of the backends, and the errors for bad images.

Legend: B images; S input side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from labeler.base.errors import IntegrityError
from labeler.sources.decoding.pixels import open_rgb
from labeler.store.stored_rows import StoredRows
from pipeline.augment.draws import Draws
from pipeline.config import LoaderConfig
from pipeline.samples import unreadable
from pipeline.targets.row_reader import LabelRowReader
from pipeline.targets.token_targets import TokenTargets

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prepared:
    """A batch before decoding.

    Attributes:
        samples: int64 [B]: the samples.
        keys: Their keys.
        sizes: int64 [B, 2]: height and width that each image must have when decoded.
        encoded: Their files, as the backend's decoder takes them.
        draws: The random numbers of the batch.
        stored: Their label rows; None: no token labels.
        masks: uint8 [B, S, S]: their masks, cropped; None: no masks.
    """

    samples: np.ndarray
    keys: tuple[str, ...]
    sizes: np.ndarray
    encoded: list[bytes]
    draws: Draws
    stored: StoredRows | None
    masks: torch.Tensor | None = None


class LoaderBackend:
    """Decodes, crops, resizes, flips, augments and normalizes the images of batches, and crops their label maps.

    Args:
        config: Settings of the loader.
        orientation: "exif" or "ignore".
        vouched: Whether the labeler has decoded every image in full.
        augments: Whether draws can have kernels or affine maps.
        device: Device of the images.
        threads: CPU threads.
    """

    name: str

    def __init__(
        self, config: LoaderConfig, orientation: str, vouched: bool, augments: bool, device: torch.device, threads: int
    ) -> None:
        self.config, self.orientation, self.vouched, self.augments = config, orientation, vouched, augments
        self.device, self.threads = device, threads
        shape = (1, 3, 1, 1)
        self._scale = (1 / (255 * torch.tensor(config.std, dtype=torch.float32, device=device))).view(shape)
        self._mean = (255 * torch.tensor(config.mean, dtype=torch.float32, device=device)).view(shape)
        # Pixels that a warp uncovers get the mean color: zero after normalization.
        self.fill = tuple(min(255, round(255 * channel)) for channel in config.mean)

    def encoded(self, data: bytes, key: str, size: np.ndarray) -> bytes:
        """Returns what the decoder gets of a file whose image has `size`, int64 [2]. Called in many threads."""
        return data

    def decode(self, data: bytes, key: str, size: np.ndarray) -> Image:
        """Decodes an image with PIL. Raises IntegrityError if that fails or its size is not `size`, int64 [2]."""
        try:
            image = open_rgb(data, self.orientation)
        except Exception as reason:  # PIL's decoders raise errors of many types
            raise unreadable(self._path(key), f"it cannot be decoded: {reason}") from None
        if (image.height, image.width) != tuple(size.tolist()):
            got = f"{image.height}×{image.width} pixels instead of {size[0]}×{size[1]}"
            raise unreadable(self._path(key), got, "Label it again, or leave it out.")
        return image

    def _path(self, key: str) -> str:
        """Returns the path of an image, for messages."""
        return f"{str(self.config.images).rstrip('/')}/{key}"

    def images(self, prepared: Iterator[Prepared]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        """Yields each batch with its images: normalized float32 [B, 3, S, S], on the device."""
        raise NotImplementedError

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalizes uint8 [B, 3, S, S] to float32."""
        return torch.sub(pixels, self._mean).mul_(self._scale)

    def targets(self, reader: LabelRowReader, rows: StoredRows, draws: Draws) -> TokenTargets:
        """Crops rows to the views of the images."""
        return reader.crop(rows, draws.views, self.config.grid)


def decoding_failed(batches: Iterable[Prepared], error: Exception) -> IntegrityError:
    """Returns the error for when a decoder fails on a batch, but not on any single image."""
    lines = [line.strip() for line in str(error).splitlines()]
    failures = [line for line in lines if any(word in line for word in ("ailed", "ailure", "not valid"))]
    keys = ", ".join(repr(key) for batch in batches for key in batch.keys[:4])
    return IntegrityError(
        "a batch cannot be decoded",
        got=(failures or lines)[0],
        remedy=f'The batch has {keys} …; backend="pil" may report the image.',
    )
