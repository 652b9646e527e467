"""The fast backend: DALI decodes, crops and resizes in its threads or on the GPU; augmentation follows on the device.

PIL decodes the files that DALI would read differently (`labeler.sources.decoding.plain_files`), in the threads that
read files.

Legend: B images; S input side.

The pipeline is the same on CPU and GPU. The windows are data, drawn beforehand, so nothing here is random.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from labeler.base.runtime import on_device
from labeler.sources.decoding.pixels import as_ppm
from labeler.sources.decoding.plain_files import plain_file
from pipeline.augment.draws import Draws
from pipeline.augment.kernels import apply_kernels, warp
from pipeline.backends.backend import LoaderBackend, Prepared, decoding_failed
from pipeline.config import LoaderConfig

log = logging.getLogger("pipeline")

METHODS = np.array([int(types.INTERP_LINEAR), int(types.INTERP_CUBIC)], np.int32)


@pipeline_def
def _windows(config: LoaderConfig, source: Any, orientation: str, on_gpu: bool, whole: bool, as_bytes: bool) -> Any:
    """DALI's pipeline from files to images [3, S, S]: bytes if augmentation follows, otherwise normalized.

    whole: decode all of each image, even if only a window is needed, so that any damage is noticed.
    """
    encoded, window, hflip, method = fn.external_source(
        source=source,
        num_outputs=4,
        dtype=[types.UINT8, types.INT32 if config.train else types.FLOAT, types.INT32, types.INT32],
        ndim=[1, 1, 0, 0],
        batch=True,
    )
    how: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": orientation == "exif"}
    if on_gpu:
        how |= {"device": "mixed", "hw_decoder_load": config.hw_decoder_load}
    part = {}
    if config.train and not whole:
        images = fn.decoders.image_slice(encoded, window[0:2], window[2:4] - window[0:2], axes=[0, 1], **how)
    elif config.train:
        images = fn.decoders.image(encoded, **how)
        images = fn.slice(images, window[0:2], window[2:4] - window[0:2], axes=[0, 1])
    else:  # resized first and cropped afterwards, so that the filter sees across the edge of the window
        images = fn.decoders.image(encoded, **how)
        part = {"roi_start": window[0:2], "roi_end": window[2:4]}
    method = fn.cast(method, dtype=types.INTERP_TYPE)
    resized = fn.resize(images, size=[config.image_size] * 2, interp_type=method, antialias=True, **part)
    if as_bytes:
        how = {"dtype": types.UINT8, "mean": [0.0] * 3, "std": [1.0] * 3}
    else:
        how = {"mean": [255 * m for m in config.mean], "std": [255 * s for s in config.std]}
    return fn.crop_mirror_normalize(resized, output_layout="CHW", mirror=hflip, **how)


class DaliBackend(LoaderBackend):
    """Decodes and resizes with DALI, and augments whole batches on the device."""

    name = "dali"

    def encoded(self, data: bytes, key: str, size: np.ndarray) -> bytes:
        """Returns the file if DALI decodes it like PIL, otherwise PIL's pixels."""
        return plain_file(data) or as_ppm(self.decode(data, key, size))

    def images(self, prepared: Iterator[Prepared]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        """Yields each batch with its images: normalized float32 [B, 3, S, S], on the device."""
        waiting: deque[Prepared] = deque()  # to be decoded again
        pending: deque[Prepared] = deque()
        failures: list[BaseException] = []

        def source() -> tuple:
            try:
                if failures and not waiting:
                    raise StopIteration
                item = waiting.popleft() if waiting else next(prepared)
            except StopIteration:  # also ends DALI's epoch
                raise
            except BaseException as error:  # raised after the batches before it
                failures.append(error)
                raise StopIteration from None
            pending.append(item)
            return self._inputs(item)

        on_gpu, augmented = self.device.type == "cuda", self.augments
        # Built for each epoch (20 ms on a CPU), so that nothing remains of an iteration that was left early.
        pipeline = self._pipeline(source, self.config.batch_size, self.config.prefetch)
        while True:
            try:
                pipeline.schedule_run()
                # On the loader's stream: DALI writes to this memory again only after what the stream has been given.
                (output,) = pipeline.share_outputs(torch.cuda.current_stream(self.device) if on_gpu else None)
                images = torch.from_dlpack(output.as_tensor())
                if on_gpu and not augmented:  # normalizing copies; `record_stream` keeps only torch's own memory
                    images = images.clone()
                pipeline.release_outputs()
            except StopIteration:
                if failures:
                    raise failures[0] from None
                return
            except RuntimeError as error:  # the pipeline and its inputs are lost
                waiting.extendleft(reversed(self._repaired(list(pending), error)))
                pending.clear()
                pipeline = self._pipeline(source, self.config.batch_size, self.config.prefetch)
                continue
            item = pending.popleft()
            yield item, self.normalize(self.augment(images, item.draws)) if augmented else images

    def _pipeline(self, source: Callable[[], tuple], batch_size: int, prefetch: int) -> Any:
        """Builds the pipeline."""
        on_gpu = self.device.type == "cuda"
        return _windows(
            self.config,
            source,
            self.orientation,
            on_gpu,
            not self.vouched,
            self.augments,
            batch_size=batch_size,
            num_threads=self.threads,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=prefetch,
        )

    def _inputs(self, item: Prepared, images: slice = slice(None)) -> tuple:
        """Returns the pipeline's inputs for a batch, or for some of its images."""
        draws = item.draws
        windows = draws.windows.astype(np.int32 if self.config.train else np.float32)
        encoded = [np.frombuffer(data, np.uint8) for data in item.encoded[images]]
        return (
            encoded,
            windows[images],
            draws.hflip.astype(np.int32)[images],
            METHODS[draws.bicubic.astype(int)][images],
        )

    def _repaired(self, batches: list[Prepared], error: Exception) -> list[Prepared]:
        """Returns batches with PIL's pixels for each image that DALI cannot decode.

        Each image is tried alone, with its window, so that a batch does not depend on others in the queue. Raises
        IntegrityError, which names the image, if PIL cannot decode it either, and if DALI can decode every image.
        """
        repaired = []
        for batch in batches:
            encoded = list(batch.encoded)
            for i, (key, size) in enumerate(zip(batch.keys, batch.sizes, strict=True)):
                if not self._decodes(batch, i):
                    encoded[i] = as_ppm(self.decode(encoded[i], key, size))
                    log.warning("DALI cannot decode %r: PIL does, so its batch takes longer", key)
            repaired.append(replace(batch, encoded=encoded))
        if all(new.encoded == old.encoded for new, old in zip(repaired, batches, strict=True)):
            raise decoding_failed(batches, error) from error
        return repaired

    def _decodes(self, batch: Prepared, i: int) -> bool:
        """Whether DALI decodes image i of a batch."""
        try:
            self._pipeline(lambda: self._inputs(batch, slice(i, i + 1)), 1, 1).run()
        except RuntimeError:
            return False
        return True

    def augment(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Augments uint8 [B, 3, S, S] in place: all kernels, then one warp of the images that need it."""
        images = apply_kernels(images, draws.kernels, draws.amounts)
        warped = np.nonzero((draws.affine != np.eye(2, 3)).any((1, 2)))[0]
        if len(warped):
            index = on_device(warped, images.device)
            images[index] = warp(images[index], torch.from_numpy(draws.affine[warped]), self.fill)
        return images
