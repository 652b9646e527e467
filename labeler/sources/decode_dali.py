"""The fast decoder, with DALI: JPEG decoding and resizing in its own threads, on the CPU or the GPU.

Legend: B images; S side of the teacher's square input.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from labeler.base.errors import LabelingError
from labeler.sources.decoder import Decoded, DecodeSettings
from labeler.sources.pixels import as_ppm, open_rgb
from labeler.sources.plain_files import plain_file

INTERPOLATIONS = {
    "bicubic": types.INTERP_CUBIC,
    "bilinear": types.INTERP_LINEAR,
    "lanczos": types.INTERP_LANCZOS3,
    "nearest": types.INTERP_NN,
}


@pipeline_def
def _teacher_input(settings: DecodeSettings) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    images = fn.decoders.image(
        encoded,
        device="mixed" if settings.device.startswith("cuda") else "cpu",
        output_type=types.RGB,
        adjust_orientation=settings.orientation == "exif",
    )
    sizes = images.shape()[:2]
    window = {}
    if settings.view == "center":
        extent = fn.cast(sizes, dtype=types.FLOAT)
        side = dali_math.min(extent[0], extent[1]) * settings.crop_pct
        window = {"roi_start": (extent - side) / 2, "roi_end": (extent + side) / 2}
    method = INTERPOLATIONS.get(settings.interpolation, types.INTERP_CUBIC)
    resized = fn.resize(images, size=[settings.size, settings.size], interp_type=method, antialias=True, **window)
    return resized, sizes


class DaliDecoder:
    """Encoded images to the teacher's input, a batch at a time; what DALI would read differently is decoded by PIL.

    An image that DALI cannot decode fails its whole batch and the pipeline with it; the batch is then decoded image
    by image, those that DALI refuses by PIL, so that only the bad ones are lost and each is named.
    """

    name = "dali"

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings
        self._pipeline: Any = None

    def __call__(self, encoded: list[bytes]) -> Decoded:
        with ThreadPoolExecutor(self.settings.threads, thread_name_prefix="pil") as pool:
            files = list(pool.map(self._file, encoded))
        failures = {i: file for i, file in enumerate(files) if isinstance(file, str)}
        try:
            pixels, sizes = self._run([file for file in files if isinstance(file, bytes)])
        except RuntimeError:
            alone = {i: self._run_alone(file) for i, file in enumerate(files) if isinstance(file, bytes)}
            failures |= {i: found for i, found in alone.items() if isinstance(found, str)}
            parts = [found for found in alone.values() if not isinstance(found, str)]
            columns = list(zip(*(parts or [self._nothing()]), strict=True))
            pixels, sizes = torch.cat(columns[0]), np.concatenate(columns[1])
        return Decoded(pixels, sizes, [i for i in range(len(files)) if i not in failures], failures)

    def _file(self, data: bytes) -> bytes | str:
        """What DALI is given of an image, or why it cannot be decoded."""
        return plain_file(data) or self._by_pil(data)

    def _by_pil(self, data: bytes) -> bytes | str:
        try:
            return as_ppm(open_rgb(data, self.settings.orientation))
        except Exception as error:  # PIL's decoders raise many types
            return f"cannot be decoded: {error}"

    def _run_alone(self, file: bytes) -> tuple[torch.Tensor, np.ndarray] | str:
        """One image, decoded by PIL where DALI refuses it, or why it cannot be decoded.

        Raises LabelingError where DALI does not take PIL's pixels either: then the image is not to blame.
        """
        try:
            return self._run([file])
        except RuntimeError:
            pixels = self._by_pil(file)
        if isinstance(pixels, str):
            return pixels
        try:
            return self._run([pixels])
        except RuntimeError as error:
            raise _no_dali(error) from None

    def _run(self, encoded: list[bytes]) -> tuple[torch.Tensor, np.ndarray]:
        if not encoded:
            return self._nothing()
        if self._pipeline is None:
            self._pipeline = self._build()
        pipeline = self._pipeline
        try:
            pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
            resized, sizes = pipeline.run()
        except RuntimeError:
            self._pipeline = None  # it is invalid after an error
            raise
        # The buffers are DALI's and are written again by the next run.
        if self.settings.device.startswith("cuda"):
            pixels = torch.from_dlpack(resized.as_tensor()).clone()
        else:  # with numpy: this is a thread of its own beside the teacher's, see `labeler.sources.resize`
            pixels = torch.from_numpy(np.array(resized.as_array()))
        return pixels, np.array(sizes.as_array(), np.int64)

    def _build(self) -> Any:
        wanted = self.settings
        pipeline = _teacher_input(
            wanted,
            batch_size=wanted.batch_size,
            num_threads=wanted.threads,
            device_id=_gpu(wanted.device),
            prefetch_queue_depth=1,
        )
        try:
            pipeline.build()
        except RuntimeError as error:
            raise _no_dali(error) from None
        return pipeline

    def _nothing(self) -> tuple[torch.Tensor, np.ndarray]:
        return torch.zeros(0, self.settings.size, self.settings.size, 3).byte(), np.zeros((0, 2), np.int64)


def _gpu(device: str) -> int | None:
    """The GPU's number; None for a CPU."""
    place = torch.device(device)
    if place.type != "cuda":
        return None
    return torch.cuda.current_device() if place.index is None else place.index


def _no_dali(error: RuntimeError) -> LabelingError:
    remedy = "Free memory or check the driver, and run the same command again; or give --decoder pil."
    return LabelingError("DALI cannot decode images here", got=_told(error), remedy=remedy)


def _told(error: RuntimeError) -> str:
    """The line of DALI's many that says what failed."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "ailed" in line or "failure" in line]
    return told[0] if told else lines[0]
