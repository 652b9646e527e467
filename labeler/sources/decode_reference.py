"""The decoder for CPUs, with PIL: readable twin of `decode_dali`, and faster than that without a GPU.

Legend: B images; S side of the teacher's square input.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from labeler.sources.decoder import Decoded, DecodeSettings, teacher_region
from labeler.sources.pixels import open_rgb
from labeler.sources.resize import resize


class ReferenceDecoder:
    """Encoded images to the teacher's input, each by itself, in as many threads as the settings say."""

    name = "pil"

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings

    def __call__(self, encoded: list[bytes]) -> Decoded:
        with ThreadPoolExecutor(self.settings.threads, thread_name_prefix="pil") as pool:
            shown = list(pool.map(self.show, encoded))
        good = {i: found for i, found in enumerate(shown) if not isinstance(found, str)}
        # With numpy: this is a thread of its own beside the teacher's, see `labeler.sources.resize`.
        pixels = np.zeros((len(good), self.settings.size, self.settings.size, 3), np.uint8)
        for place, (image, _) in enumerate(good.values()):
            pixels[place] = image
        sizes = np.array([size for _, size in good.values()], np.int64).reshape(-1, 2)
        failures = {i: found for i, found in enumerate(shown) if isinstance(found, str)}
        return Decoded(torch.from_numpy(pixels), sizes, list(good), failures)

    def show(self, data: bytes) -> tuple[np.ndarray, tuple[int, int]] | str:
        """One image [S, S, 3], and its height and width; or why it cannot be decoded."""
        wanted = self.settings
        try:
            image = open_rgb(data, wanted.orientation)
        except Exception as error:  # PIL's decoders raise many types
            return f"cannot be decoded: {error}"
        height, width = image.height, image.width
        y0, x0, y1, x1 = teacher_region(height, width, wanted.view, wanted.crop_pct)
        box = None if wanted.view == "full" else (y0 * height, x0 * width, y1 * height, x1 * width)
        return resize(np.array(image), wanted.size, wanted.interpolation, box), (height, width)
