"""Small things that tests label: a teacher that reads colours, images, and scores made by hand.

Legend: B images; C classes; P palette size; H×W map grid; S input side.
"""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

CLASSES = 6
SIDE, GRID = 32, 4


class ColourTeacher(nn.Module):
    """Class scores of each 8×8 cell are a fixed linear function of its mean colour: cheap, and right in place."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(3 * torch.randn(CLASSES, 3, generator=generator), requires_grad=False)
        self.default_cfg = {
            "input_size": (3, SIDE, SIDE),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bilinear",
            "crop_pct": 0.875,
        }

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        cells = nn.functional.avg_pool2d(images, SIDE // GRID)
        return torch.einsum("kc,bchw->bkhw", self.weight, cells)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.score_maps(images).mean((2, 3))


def colour_teacher() -> nn.Module:
    return ColourTeacher()


class ThousandClassesTeacher(ColourTeacher):
    """As many classes as ImageNet, all of the same scores but for the first six."""

    num_classes = 1000

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(super().score_maps(images), (0, 0, 0, 0, 0, self.num_classes - CLASSES))


def thousand_classes_teacher() -> nn.Module:
    return ThousandClassesTeacher()


class SlowTeacher(ColourTeacher):
    """Takes a while over each batch, so that a run can be killed in its middle."""

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return super().score_maps(images)


def slow_teacher() -> nn.Module:
    return SlowTeacher()


class CrashingTeacher(ColourTeacher):
    """Ends its process, as a crash in a native library would, over an image that is nearly all red."""

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        red = (images[:, 0] > 0.9) & (images[:, 1] < -0.9) & (images[:, 2] < -0.9)
        if (red.float().mean((1, 2)) > 0.9).any():
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().score_maps(images)


def crashing_teacher() -> nn.Module:
    return CrashingTeacher()


def picture(seed: int, height: int = 40, width: int = 52) -> Image.Image:
    """Smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_images(root: Path, count: int = 12, classes: int = 3) -> Path:
    """`count` JPEGs in folders class0, class1 …, of different sizes."""
    for i in range(count):
        folder = root / f"class{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"img{i:03d}.jpg").write_bytes(encoded(picture(i, 36 + i % 5, 40 + i % 7)))
    return root


def synthetic_logits(images: int, classes: int, grid: int, seed: int) -> torch.Tensor:
    """[B, C, H, W]: smooth fields per class, eight strong classes an image, noise of 0.15 per cell."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(channels: int, points: int) -> torch.Tensor:
        coarse = torch.randn(images, channels, points, points, generator=generator)
        return nn.functional.interpolate(coarse, (grid, grid), mode="bicubic", align_corners=False)

    logits = 0.7 * smooth(classes, 4)
    strong = torch.stack([torch.randperm(classes, generator=generator)[:8] for _ in range(images)])
    peaks = torch.linspace(7, 4, 8)[None, :, None, None] + 2 * smooth(8, 3)
    logits.scatter_add_(1, strong[:, :, None, None].expand(-1, -1, grid, grid), peaks)
    return logits + 0.15 * torch.randn(logits.shape, generator=generator)


class BreakingTeacher(ColourTeacher):
    """Makes the store unwritable in the middle of the run, as a disk that goes away would."""

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        import ray

        import labeler.base.whole_files

        def failing(*_: object, **__: object) -> int:
            raise OSError(5, "Input/output error")

        if ray.get_runtime_context().get_actor_id():  # the driver tries the teacher too
            labeler.base.whole_files.os.rename = failing
        return super().score_maps(images)


def teacher_that_breaks_the_store() -> nn.Module:
    return BreakingTeacher()
