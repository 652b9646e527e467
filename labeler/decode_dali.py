"""The fast decoder, with DALI: JPEG decoding and resizing in its own threads, on the CPU or the GPU.

Legend: B images; S side of the teacher's square input.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from labeler.decode import Decoded

INTERPOLATIONS = {
    "bicubic": types.INTERP_CUBIC,
    "bilinear": types.INTERP_LINEAR,
    "lanczos": types.INTERP_LANCZOS3,
    "nearest": types.INTERP_NN,
}


@pipeline_def
def _teacher_input(size: int, view: str, crop_pct: float, interpolation: str, orientation: str, decoder: str) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    images = fn.decoders.image(encoded, device=decoder, output_type=types.RGB, adjust_orientation=orientation == "exif")
    sizes = images.shape()[:2]
    window = {}
    if view == "center":
        extent = fn.cast(sizes, dtype=types.FLOAT)
        side = dali_math.min(extent[0], extent[1]) * crop_pct
        window = {"roi_start": (extent - side) / 2, "roi_end": (extent + side) / 2}
    resized = fn.resize(images, size=[size, size], interp_type=INTERPOLATIONS[interpolation], antialias=True, **window)
    return resized, sizes


class DaliDecoder:
    """Encoded images to the teacher's input, a batch at a time.

    An image that DALI cannot decode fails its whole batch and the pipeline with it; the batch is then decoded image
    by image, so that only the bad ones are lost and each is named.
    """

    name = "dali"

    def __init__(
        self,
        size: int,
        view: str,
        crop_pct: float,
        interpolation: str,
        orientation: str,
        batch_size: int,
        threads: int,
        device: str,
    ) -> None:
        on_gpu = device.startswith("cuda")
        self._settings = {
            "size": size,
            "view": view,
            "crop_pct": crop_pct,
            "interpolation": interpolation if interpolation in INTERPOLATIONS else "bicubic",
            "orientation": orientation,
            "decoder": "mixed" if on_gpu else "cpu",
            "batch_size": batch_size,
            "num_threads": threads,
            "device_id": torch.cuda.current_device() if on_gpu else None,
            "prefetch_queue_depth": 1,
        }
        self._size = size
        self._pipeline: Any = None

    def __call__(self, encoded: list[bytes]) -> Decoded:
        failures: dict[int, str] = {}
        kept = list(range(len(encoded)))
        try:
            pixels, sizes = self._run(encoded)
        except RuntimeError:
            parts, kept = [], []
            for i, data in enumerate(encoded):
                try:
                    parts.append(self._run([data]))
                    kept.append(i)
                except RuntimeError as error:
                    failures[i] = _reason(data, error)
            pixels = torch.cat([p for p, _ in parts]) if parts else torch.zeros(0, self._size, self._size, 3).byte()
            sizes = np.concatenate([s for _, s in parts]) if parts else np.zeros((0, 2), np.int64)
        return Decoded(pixels, sizes, kept, failures)

    def _run(self, encoded: list[bytes]) -> tuple[torch.Tensor, np.ndarray]:
        if not encoded:
            return torch.zeros(0, self._size, self._size, 3).byte(), np.zeros((0, 2), np.int64)
        if self._pipeline is None:
            self._pipeline = _teacher_input(**self._settings)
            self._pipeline.build()
        pipeline = self._pipeline
        try:
            pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
            resized, sizes = pipeline.run()
        except RuntimeError:
            self._pipeline = None  # it is invalid after an error
            raise
        # The buffers are DALI's and are written again by the next run.
        pixels = torch.from_dlpack(resized.as_tensor()).clone()
        return pixels, np.array(sizes.as_array(), np.int64)


def _reason(data: bytes, error: RuntimeError) -> str:
    """A line that a person understands: PIL's where it fails too, else DALI's."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as cause:  # PIL's decoders raise many types
        return f"cannot be decoded: {cause}"
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "ailed" in line or "failure" in line]
    return f"cannot be decoded by DALI: {told[0] if told else lines[0]}"
