"""The decoders for CPUs: `cpu`, and its readable twin, with PIL alone. Their pixels are the same, bit for bit.

Legend: B images; S side of the teacher's square input.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from labeler.sources.decoding.decoder import Decoded, DecodeSettings, teacher_region
from labeler.sources.decoding.jpeg_pixels import jpeg_pixels
from labeler.sources.decoding.pixels import open_rgb
from labeler.sources.decoding.resize import resize


class ReferenceDecoder:
    """Decodes images one by one with PIL, in as many threads as the settings say."""

    name = "pil"

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings

    def __call__(self, encoded: list[bytes]) -> Decoded:
        """Decodes a batch of image files."""
        with ThreadPoolExecutor(self.settings.threads, thread_name_prefix="pil") as pool:
            results = list(pool.map(self.load_image, encoded))
        good = {i: result for i, result in enumerate(results) if not isinstance(result, str)}
        # With numpy, since this thread runs beside the teacher's, see `labeler.sources.decoding.resize`.
        pixels = np.zeros((len(good), self.settings.size, self.settings.size, 3), np.uint8)
        for index, (image, _) in enumerate(good.values()):
            pixels[index] = image
        sizes = np.array([size for _, size in good.values()], np.int64).reshape(-1, 2)
        failures = {i: result for i, result in enumerate(results) if isinstance(result, str)}
        return Decoded(torch.from_numpy(pixels), sizes, list(good), failures)

    def load_image(self, data: bytes) -> tuple[np.ndarray, tuple[int, int]] | str:
        """Returns one image [S, S, 3] with its original height and width, or why it cannot be decoded."""
        settings = self.settings
        try:
            pixels = self.decode(data)
        except Exception as error:  # PIL's decoders raise errors of many types
            return f"cannot be decoded: {error}"
        height, width = pixels.shape[:2]
        y0, x0, y1, x1 = teacher_region(height, width, settings.view, settings.crop_pct)
        box = None if settings.view == "full" else (y0 * height, x0 * width, y1 * height, x1 * width)
        return resize(pixels, settings.size, settings.interpolation, box), (height, width)

    def decode(self, data: bytes) -> np.ndarray:
        """Returns the pixels of an image, uint8 [height, width, 3]."""
        return np.array(open_rgb(data, self.settings.orientation))


class CpuDecoder(ReferenceDecoder):
    """Decodes ordinary JPEGs with simplejpeg, and all else with PIL."""

    name = "cpu"

    def decode(self, data: bytes) -> np.ndarray:
        """Returns the pixels of an image, uint8 [height, width, 3]."""
        pixels = jpeg_pixels(data, self.settings.orientation)
        return super().decode(data) if pixels is None else pixels
