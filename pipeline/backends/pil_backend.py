"""The readable backend, with PIL and timm's operations: twin of `dali_backend` and `cpu_backend`.

Legend: B images; S input side.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import auto_augment as timm_ops

from labeler.base.runtime import on_device
from labeler.store.stored_rows import StoredRows
from pipeline.augment import policy
from pipeline.augment.draws import Draws
from pipeline.backends.backend import LoaderBackend, Prepared
from pipeline.targets.crop_reference import crop_one_by_one
from pipeline.targets.row_reader import LabelRowReader
from pipeline.targets.token_targets import TokenTargets

PIL_KERNELS = {
    policy.AUTOCONTRAST: lambda image, _: timm_ops.auto_contrast(image),
    policy.EQUALIZE: lambda image, _: timm_ops.equalize(image),
    policy.INVERT: lambda image, _: timm_ops.invert(image),
    # PIL's own cannot keep 0 bits, which level 10 of "PosterizeIncreasing" needs.
    policy.POSTERIZE: lambda image, bits: image.point([v & (256 - 2 ** (8 - int(bits))) for v in range(256)] * 3),
    policy.SOLARIZE: lambda image, threshold: timm_ops.solarize(image, int(threshold)),
    policy.SOLARIZE_ADD: lambda image, added: timm_ops.solarize_add(image, int(added)),
    policy.COLOR: timm_ops.color,
    policy.CONTRAST: timm_ops.contrast,
    policy.BRIGHTNESS: timm_ops.brightness,
    policy.SHARPNESS: timm_ops.sharpness,
    policy.BLUR: lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
}


class PilBackend(LoaderBackend):
    """Decodes and augments with PIL, one image at a time."""

    name = "pil"

    def images(self, prepared: Iterator[Prepared]) -> Iterator[tuple[Prepared, torch.Tensor]]:
        """Yields each batch with its images: normalized float32 [B, 3, S, S], on the device."""
        with ThreadPoolExecutor(self.threads) as pool:
            for item in prepared:
                images = pool.map(lambda i, item=item: self.load_image(item, i), range(len(item.draws)))
                pixels = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).contiguous()
                yield item, self.normalize(on_device(pixels, self.device))

    def load_image(self, item: Prepared, i: int) -> np.ndarray:
        """Decodes, crops and augments image i of a batch; returns uint8 [S, S, 3]."""
        return np.asarray(self.augment(self.view(item, i), item.draws, i))

    def view(self, item: Prepared, i: int) -> Image.Image:
        """Decodes, crops, resizes and flips image i of a batch."""
        image = self.decode(item.encoded[i], item.keys[i], item.sizes[i])
        draws, side = item.draws, self.config.image_size
        y0, x0, y1, x1 = draws.windows[i].tolist()
        method = Image.Resampling.BICUBIC if draws.bicubic[i] else Image.Resampling.BILINEAR
        if self.config.train:
            image = image.crop((x0, y0, x1, y1)).resize((side, side), method)
        else:  # resized from the whole image, so that the filter sees across the edge of the window
            image = image.resize((side, side), method, box=(x0, y0, x1, y1))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.hflip[i] else image

    def augment(self, image: Image.Image, draws: Draws, i: int) -> Image.Image:
        """Augments image i of a batch."""
        for kernel, amount in zip(draws.kernels[i], draws.amounts[i], strict=True):
            if kernel != policy.KEEP:
                image = PIL_KERNELS[int(kernel)](image, float(amount))
        return self.warp(image, draws.affine[i])

    def warp(self, image: Image.Image, affine: np.ndarray) -> Image.Image:
        """Applies the affine map [2, 3] of an image, with PIL."""
        if (affine == np.eye(2, 3)).all():
            return image
        (yy, yx, y), (xy, xx, x) = affine.tolist()
        side = self.config.image_size
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            (xx, xy, x * side, yx, yy, y * side),
            Image.Resampling.BILINEAR,
            fillcolor=self.fill,
        )

    def targets(self, reader: LabelRowReader, rows: StoredRows, draws: Draws) -> TokenTargets:
        """Crops rows to the views of the images, one at a time."""
        return crop_one_by_one(reader.decode(rows), draws.views, self.config.grid)
