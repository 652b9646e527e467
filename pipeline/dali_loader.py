"""The fast backend: DALI decodes and crops, on a GPU it resizes, too; augmentation follows on the device.

Legend: B images; S input side.

What is shown of each image is data, drawn beforehand, so nothing here is random. On a CPU DALI's resizing takes ten
times as long as `labeler.resize`, which threads of our own call while DALI decodes the next batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from labeler.resize import resize
from labeler.score_maps import ScoreMaps
from pipeline.augment_ops import apply_kernels, warp
from pipeline.backend import LoaderBackend, Prepared, decoding_failed
from pipeline.config import LoaderConfig
from pipeline.draws import Draws
from pipeline.targets import TokenTargets, crop_score_maps

METHODS = np.array([int(types.INTERP_LINEAR), int(types.INTERP_CUBIC)], np.int32)


@pipeline_def
def _decoded(source: Any, orientation: str, sliced: bool) -> Any:
    """[height, width, 3] of each image on a CPU; sliced: of its window alone."""
    how: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": orientation == "exif"}
    kinds: dict[str, Any] = {"dtype": [types.UINT8, types.INT32], "ndim": [1, 1]}
    if not sliced:
        (encoded,) = fn.external_source(source=source, num_outputs=1, dtype=types.UINT8, ndim=1, batch=True)
        return fn.decoders.image(encoded, **how)
    encoded, window = fn.external_source(source=source, num_outputs=2, batch=True, **kinds)
    return fn.decoders.image_slice(encoded, window[0:2], window[2:4] - window[0:2], axes=[0, 1], **how)


@pipeline_def
def _shown(config: LoaderConfig, source: Any, orientation: str, sliced: bool, as_bytes: bool) -> Any:
    """[3, S, S] of each image on a GPU: bytes where augmentation follows, otherwise normalised."""
    encoded, window, hflip, method = fn.external_source(
        source=source,
        num_outputs=4,
        dtype=[types.UINT8, types.INT32 if config.train else types.FLOAT, types.INT32, types.INT32],
        ndim=[1, 1, 0, 0],
        batch=True,
    )
    how: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": orientation == "exif"}
    how |= {"device": "mixed", "hw_decoder_load": config.hw_decoder_load}
    part = {}
    if sliced:
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

    def images(self, prepared: Iterator[Prepared]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        on_gpu, config = self.device.type == "cuda", self.config
        # Elsewhere all of an image is decoded: for its filter in evaluation, or so that any damage is noticed.
        sliced = config.train and self.vouched
        pending: deque[Prepared] = deque()
        failures: list[BaseException] = []

        def source() -> tuple:
            try:
                item = next(prepared)  # its StopIteration ends DALI's epoch as well
            except StopIteration:
                raise
            except BaseException as error:  # told when the batches before it are out
                failures.append(error)
                raise StopIteration from None
            pending.append(item)
            encoded = [np.frombuffer(data, np.uint8) for data in item.encoded]
            if not on_gpu and not sliced:
                return (encoded,)
            windows = item.draws.windows.astype(np.int32 if config.train else np.float32)
            if not on_gpu:
                return encoded, windows
            return encoded, windows, item.draws.hflip.astype(np.int32), METHODS[item.draws.bicubic.astype(int)]

        # Built anew each epoch, 20 ms on a CPU: nothing of an iteration that was left early can stay in it.
        how = {"batch_size": config.batch_size, "num_threads": self.threads, "prefetch_queue_depth": config.prefetch}
        if on_gpu:
            pipeline = _shown(
                config, source, self.orientation, sliced, self.augments, device_id=self.device.index, **how
            )
        else:
            pipeline = _decoded(source, self.orientation, sliced, device_id=None, **how)
        with ThreadPoolExecutor(self.threads, "resize") as pool:
            while True:
                try:
                    pipeline.schedule_run()
                    # Ordered on the stream that uses them; DALI frees what torch gives back once the device is through.
                    (output,) = pipeline.share_outputs(torch.cuda.current_stream(self.device) if on_gpu else None)
                except StopIteration:
                    if failures:
                        raise failures[0] from None
                    return
                except RuntimeError as error:
                    raise decoding_failed(pending, self.orientation, error) from error
                item = pending.popleft()
                images = torch.from_dlpack(output.as_tensor()) if on_gpu else self.resized(output, item.draws, pool)
                pipeline.release_outputs()
                if self.augments:
                    images = self.augment(images, item.draws)
                yield item, self.normalize(images) if self.augments or not on_gpu else images

    def resized(self, output: Any, draws: Draws, pool: ThreadPoolExecutor) -> torch.Tensor:
        """uint8 [B, 3, S, S]: the windows of a batch that was decoded on a CPU."""

        def show(i: int) -> torch.Tensor:
            pixels, side = np.asarray(output[i]), self.config.image_size
            method = "bicubic" if draws.bicubic[i] else "bilinear"
            y0, x0, y1, x1 = draws.windows[i].tolist()
            if not self.config.train:  # resized as a whole and cropped then, the filter sees across the window's edge
                image = resize(pixels, side, method, (y0, x0, y1, x1))
            elif self.vouched:
                image = resize(pixels, side, method)
            else:
                image = resize(pixels[int(y0) : int(y1), int(x0) : int(x1)], side, method)
            return image.flip(-1) if draws.hflip[i] else image

        return torch.cat(list(pool.map(show, range(len(draws)))))

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
