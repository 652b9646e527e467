"""The fast backend: DALI decodes, crops and resizes in its threads or on the GPU; augmentation follows on the device.

What DALI would read differently than PIL (`labeler.sources.plain_files`), PIL decodes first, where files are read.

Legend: B images; S input side.

One definition serves both machines. What is shown of each image is data, drawn beforehand, so nothing here is random.
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

from labeler.sources.pixels import as_ppm
from labeler.sources.plain_files import plain_file
from labeler.store.score_maps import ScoreMaps
from pipeline.augment.draws import Draws
from pipeline.augment.operations import apply_kernels, warp
from pipeline.backend import LoaderBackend, Prepared, decoding_failed
from pipeline.config import LoaderConfig
from pipeline.labels.targets import TokenTargets, crop_score_maps

log = logging.getLogger("pipeline")

METHODS = np.array([int(types.INTERP_LINEAR), int(types.INTERP_CUBIC)], np.int32)


@pipeline_def
def _windows(config: LoaderConfig, source: Any, orientation: str, on_gpu: bool, whole: bool, as_bytes: bool) -> Any:
    """[3, S, S] of each image: bytes where augmentation follows, otherwise normalised.

    whole: decode all of each image, also where a window shows a part, so that any damage is noticed
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
    else:  # resized as a whole and cropped then, the filter sees across the window's edge
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
    name = "dali"

    def encoded(self, data: bytes, key: str, size: np.ndarray) -> bytes:
        """The file where DALI decodes it as PIL does, otherwise PIL's pixels."""
        return plain_file(data) or as_ppm(self.decode(data, key, size))

    def images(self, prepared: Iterator[Prepared]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        waiting: deque[Prepared] = deque()  # to be decoded again
        pending: deque[Prepared] = deque()
        failures: list[BaseException] = []

        def source() -> tuple:
            try:
                if failures and not waiting:
                    raise StopIteration
                item = waiting.popleft() if waiting else next(prepared)
            except StopIteration:  # ends DALI's epoch as well
                raise
            except BaseException as error:  # told when the batches before it are out
                failures.append(error)
                raise StopIteration from None
            pending.append(item)
            return self._fed(item)

        on_gpu, augmented = self.device.type == "cuda", self.augments
        # Built anew each epoch, 20 ms on a CPU: nothing of an iteration that was left early can stay in it.
        pipeline = self._pipeline(source, self.config.batch_size, self.config.prefetch)
        while True:
            try:
                pipeline.schedule_run()
                # Ordered on the stream that uses them; DALI frees what torch gives back after a device synchronisation.
                (output,) = pipeline.share_outputs(torch.cuda.current_stream(self.device) if on_gpu else None)
                images = torch.from_dlpack(output.as_tensor())
                pipeline.release_outputs()
            except StopIteration:
                if failures:
                    raise failures[0] from None
                return
            except RuntimeError as error:  # the pipeline is lost, and all that it was given
                waiting.extendleft(reversed(self._mended(list(pending), error)))
                pending.clear()
                pipeline = self._pipeline(source, self.config.batch_size, self.config.prefetch)
                continue
            item = pending.popleft()
            yield item, self.normalize(self.augment(images, item.draws)) if augmented else images

    def _pipeline(self, source: Callable[[], tuple], batch_size: int, prefetch: int) -> Any:
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

    def _fed(self, item: Prepared, images: slice = slice(None)) -> tuple:
        """What the pipeline is given of a batch, or of some images of it."""
        draws = item.draws
        windows = draws.windows.astype(np.int32 if self.config.train else np.float32)
        encoded = [np.frombuffer(data, np.uint8) for data in item.encoded[images]]
        return (
            encoded,
            windows[images],
            draws.hflip.astype(np.int32)[images],
            METHODS[draws.bicubic.astype(int)][images],
        )

    def _mended(self, batches: list[Prepared], error: Exception) -> list[Prepared]:
        """The batches with PIL's pixels in place of each image that DALI refuses.

        Each is tried alone and with its window, so that a batch is the same whichever others were waiting with it.
        Raises IntegrityError naming the image where PIL refuses it too, and where DALI refuses none alone.
        """
        mended = []
        for batch in batches:
            encoded = list(batch.encoded)
            for i, (key, size) in enumerate(zip(batch.keys, batch.sizes, strict=True)):
                if not self._takes(batch, i):
                    encoded[i] = as_ppm(self.decode(encoded[i], key, size))
                    log.warning("DALI cannot decode %r: PIL does, and its batch takes longer", key)
            mended.append(replace(batch, encoded=encoded))
        if all(new.encoded == old.encoded for new, old in zip(mended, batches, strict=True)):
            raise decoding_failed(batches, error) from error
        return mended

    def _takes(self, batch: Prepared, i: int) -> bool:
        """Whether DALI decodes image i of a batch."""
        try:
            self._pipeline(lambda: self._fed(batch, slice(i, i + 1)), 1, 1).run()
        except RuntimeError:
            return False
        return True

    def augment(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """uint8 [B, 3, S, S], changed in place: every kernel, then one warp of those images that need it."""
        images = apply_kernels(images, draws.kernels, draws.amounts)
        bent = np.nonzero((draws.affine != np.eye(2, 3)).any((1, 2)))[0]
        if len(bent):
            index = torch.from_numpy(bent).to(images.device)
            images[index] = warp(images[index], torch.from_numpy(draws.affine[bent]), self.fill)
        return images

    def targets(self, maps: ScoreMaps, draws: Draws) -> TokenTargets:
        return crop_score_maps(maps, draws.views.boxes, self.config.grid, affine=draws.views.affine)
