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

from labeler.decode import Decoded, DecodeSettings
from labeler.errors import LabelingError

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
    """Encoded images to the teacher's input, a batch at a time.

    An image that DALI cannot decode fails its whole batch and the pipeline with it; the batch is then decoded image
    by image, so that only the bad ones are lost and each is named.
    """

    name = "dali"

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings
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
                    failures[i] = self._reason(data, error)
            columns = list(zip(*(parts or [self._nothing()]), strict=True))
            pixels, sizes = torch.cat(columns[0]), np.concatenate(columns[1])
        return Decoded(pixels, sizes, kept, failures)

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
        else:  # with numpy: this is a thread of its own beside the teacher's, see `labeler.resize`
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

    def _reason(self, data: bytes, error: RuntimeError) -> str:
        """A line that a person understands: PIL's where it fails too, else DALI's.

        Raises LabelingError where DALI decodes nothing else either: then the image is not to blame.
        """
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except Exception as cause:  # PIL's decoders raise many types
            return f"cannot be decoded: {cause}"
        try:
            self._run([_sound_jpeg()])
        except RuntimeError as again:
            raise _no_dali(again) from None
        return f"cannot be decoded by DALI: {_told(error)}"

    def _nothing(self) -> tuple[torch.Tensor, np.ndarray]:
        return torch.zeros(0, self.settings.size, self.settings.size, 3).byte(), np.zeros((0, 2), np.int64)


def _gpu(device: str) -> int | None:
    """The GPU's number; None for a CPU."""
    place = torch.device(device)
    if place.type != "cuda":
        return None
    return torch.cuda.current_device() if place.index is None else place.index


def _sound_jpeg() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()


def _no_dali(error: RuntimeError) -> LabelingError:
    remedy = "Free memory or check the driver, and run the same command again; or give --decoder pil."
    return LabelingError("DALI cannot decode images here", got=_told(error), remedy=remedy)


def _told(error: RuntimeError) -> str:
    """The line of DALI's many that says what failed."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "ailed" in line or "failure" in line]
    return told[0] if told else lines[0]
