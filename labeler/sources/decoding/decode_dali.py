"""The fast decoder, with DALI: decodes and resizes in its own threads, on the CPU or the GPU.

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
from labeler.sources.decoding.decoder import Decoded, DecodeSettings
from labeler.sources.decoding.pixels import as_ppm, open_rgb
from labeler.sources.decoding.plain_files import plain_file

INTERPOLATIONS = {
    "bicubic": types.INTERP_CUBIC,
    "bilinear": types.INTERP_LINEAR,
    "lanczos": types.INTERP_LANCZOS3,
    "nearest": types.INTERP_NN,
}


@pipeline_def
def _teacher_input(settings: DecodeSettings) -> Any:
    """DALI's pipeline from files to the teacher's input, and the sizes of the decoded images."""
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
    """Decodes a batch of images at a time. PIL decodes files that DALI would read differently.

    An image that DALI cannot decode makes its whole batch fail, and the pipeline with it. Then the images are decoded
    one by one, with PIL if DALI fails, so that only bad images are lost and each is named.

    Args:
        settings: Settings of the decoder.
    """

    name = "dali"

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings
        self._pipeline: Any = None

    def __call__(self, encoded: list[bytes]) -> Decoded:
        """Decodes a batch of image files."""
        with ThreadPoolExecutor(self.settings.threads, thread_name_prefix="pil") as pool:
            files = list(pool.map(self._file, encoded))
        failures = {i: file for i, file in enumerate(files) if isinstance(file, str)}
        try:
            pixels, sizes = self._run([file for file in files if isinstance(file, bytes)])
        except RuntimeError:
            alone = {i: self._run_alone(file) for i, file in enumerate(files) if isinstance(file, bytes)}
            failures |= {i: result for i, result in alone.items() if isinstance(result, str)}
            parts = [result for result in alone.values() if not isinstance(result, str)]
            columns = list(zip(*(parts or [self._nothing()]), strict=True))
            pixels, sizes = torch.cat(columns[0]), np.concatenate(columns[1])
        return Decoded(pixels, sizes, [i for i in range(len(files)) if i not in failures], failures)

    def _file(self, data: bytes) -> bytes | str:
        """Returns what DALI gets of an image, or why it cannot be decoded."""
        return plain_file(data) or self._by_pil(data)

    def _by_pil(self, data: bytes) -> bytes | str:
        """Decodes an image with PIL; returns a PPM, or why it cannot be decoded."""
        try:
            return as_ppm(open_rgb(data, self.settings.orientation))
        except Exception as error:  # PIL's decoders raise errors of many types
            return f"cannot be decoded: {error}"

    def _run_alone(self, file: bytes) -> tuple[torch.Tensor, np.ndarray] | str:
        """Decodes one image, with PIL if DALI fails; returns why if it cannot be decoded.

        Raises LabelingError if DALI fails on PIL's pixels as well: then the image is not the cause.
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
        """Runs the pipeline; returns pixels and sizes."""
        if not encoded:
            return self._nothing()
        if self._pipeline is None:
            self._pipeline = self._build()
        pipeline = self._pipeline
        try:
            pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
            # Outputs of a GPU are bound to torch's stream: DALI uses their memory again only after the copy below.
            on_gpu = self.settings.device.startswith("cuda")
            resized, sizes = pipeline.run(torch.cuda.current_stream(self.settings.device)) if on_gpu else pipeline.run()
        except RuntimeError:
            self._pipeline = None  # it is invalid after an error
            raise
        # The buffers belong to DALI, and the next run overwrites them.
        if on_gpu:
            pixels = torch.from_dlpack(resized.as_tensor()).clone()
        else:  # with numpy, since this thread runs beside the teacher's, see `labeler.sources.decoding.resize`
            pixels = torch.from_numpy(np.array(resized.as_array()))
        return pixels, np.array(sizes.as_array(), np.int64)

    def _build(self) -> Any:
        """Builds the pipeline."""
        settings = self.settings
        pipeline = _teacher_input(
            settings,
            batch_size=settings.batch_size,
            num_threads=settings.threads,
            device_id=_gpu(settings.device),
            prefetch_queue_depth=1,
        )
        try:
            pipeline.build()
        except RuntimeError as error:
            raise _no_dali(error) from None
        return pipeline

    def _nothing(self) -> tuple[torch.Tensor, np.ndarray]:
        """Returns the pixels and sizes of no images."""
        return torch.zeros(0, self.settings.size, self.settings.size, 3).byte(), np.zeros((0, 2), np.int64)


def _gpu(device: str) -> int | None:
    """Returns the GPU's index; None for a CPU."""
    torch_device = torch.device(device)
    if torch_device.type != "cuda":
        return None
    return torch.cuda.current_device() if torch_device.index is None else torch_device.index


def _no_dali(error: RuntimeError) -> LabelingError:
    """Returns the error for when DALI does not work."""
    remedy = "Free memory or check the driver, and run the same command again; or give `decoder=cpu`."
    return LabelingError("DALI cannot decode images here", got=_error_line(error), remedy=remedy)


def _error_line(error: RuntimeError) -> str:
    """Returns the line of DALI's long message that says what failed."""
    lines = [line.strip() for line in str(error).splitlines()]
    matches = [line for line in lines if "ailed" in line or "failure" in line]
    return matches[0] if matches else lines[0]
