"""The fast backend without a GPU: threads of this process decode, crop, resize, augment and normalize image by image.

simplejpeg decodes ordinary JPEGs (`labeler.sources.decoding.jpeg_pixels`), Numba's kernels resize, and PIL does the
rest, and all where these two are not installed: the pixels are the same, those of `pil_backend`. No operator of torch
runs in these threads: each of them would bring OpenMP threads of its own, for which those of a training step would
wait.

Legend: B images; S input side.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from labeler.base.runtime import on_device
from labeler.sources.decoding.jpeg_pixels import jpeg_pixels
from labeler.store.stored_rows import StoredRows
from pipeline.augment import policy
from pipeline.augment.draws import Draws
from pipeline.backends.backend import Prepared
from pipeline.backends.batch_memory import BatchMemory
from pipeline.backends.pil_backend import PilBackend
from pipeline.backends.resize import normalize, resize
from pipeline.prefetcher import Prefetcher
from pipeline.targets.row_reader import LabelRowReader
from pipeline.targets.token_targets import TokenTargets


class CpuBackend(PilBackend):
    """Decodes and augments in as many threads as the settings say, a few batches ahead."""

    name = "cpu"

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self._host_mean, self._host_scale = (part.cpu().numpy().ravel() for part in (self._mean, self._scale))

    def images(self, prepared: Iterator[Prepared]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        """Yields each batch with its images: normalized float32 [B, 3, S, S], on the device."""
        pool = ThreadPoolExecutor(self.threads, "decoding")
        begun = Prefetcher(self._begin(prepared, pool), self.config.prefetch)
        try:
            for item, images, loading in begun:
                for image in loading:
                    image.result()
                yield item, on_device(images, self.device)
        finally:
            begun.close()
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(
        self, prepared: Iterator[Prepared], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Prepared, torch.Tensor, list[Future[None]]]]:
        """Yields each batch with the memory for its images, and what fills it."""
        side, memory = self.config.image_size, BatchMemory(self.config.prefetch + 4)
        for item in prepared:
            images = memory.take((len(item.draws), 3, side, side))
            loading = [pool.submit(self._load, item, i, images[i]) for i in range(len(images))]
            yield item, torch.from_numpy(images), loading

    def _load(self, item: Prepared, i: int, out: np.ndarray) -> None:
        """Writes image i of a batch, normalized, to float32 [3, S, S]."""
        pixels = self._resized(item, i)
        draws = item.draws
        if (draws.kernels[i] != policy.KEEP).any() or (draws.affine[i] != np.eye(2, 3)).any():
            side = self.config.image_size
            image = self.augment(Image.frombytes("RGB", (side, side), pixels, "raw", "RGBX"), draws, i)
            pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8).reshape(side, 4 * side)
        normalize(pixels, self._host_mean, self._host_scale, out)

    def _resized(self, item: Prepared, i: int) -> np.ndarray:
        """Decodes, crops, resizes and flips image i of a batch; returns uint8 [S, 4·S]: RGBX."""
        data, size, draws = item.encoded[i], tuple(item.sizes[i].tolist()), item.draws
        window = draws.windows[i].tolist()
        # Only where the labeler has decoded the whole image: otherwise any damage is to be noticed.
        rows = window[2] if self.config.train and self.vouched else None
        pixels = jpeg_pixels(data, self.orientation, size, rows)
        if pixels is None:
            pixels = np.asarray(self.decode(data, item.keys[i], item.sizes[i]))
        whole = (0, 0, *size)
        seen, box = (window, None) if self.config.train else (whole, window)
        return resize(pixels, self.config.image_size, seen, box, bool(draws.bicubic[i]), bool(draws.hflip[i]))

    def targets(self, reader: LabelRowReader, rows: StoredRows, draws: Draws) -> TokenTargets:
        """Crops rows to the views of the images."""
        return reader.crop(rows, draws.views, self.config.grid)
