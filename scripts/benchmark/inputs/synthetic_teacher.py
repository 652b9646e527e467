"""A teacher that takes almost no time, for benchmarks of everything else.

Legend: B images; C classes; H×W map grid.
"""

from __future__ import annotations

import torch
from torch import nn

from scripts.benchmark.inputs.synthetic_maps import CLASSES, MAP

CELL = 8  # pixels


class SyntheticTeacher(nn.Module):
    """The class scores of each 8×8 cell are a fixed linear function of its color: a full-size map at almost no cost."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        weight = 3 * torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(weight, requires_grad=False)
        look = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "crop_pct": 0.875}
        self.default_cfg = {"input_size": (3, CELL * MAP, CELL * MAP), **look}

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images [B, 3, 8·H, 8·W] to scores [B, C, H, W]."""
        return torch.einsum("kc,bchw->bkhw", self.weight, nn.functional.avg_pool2d(images, CELL))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images [B, 3, 8·H, 8·W] to scores [B, C]."""
        return self.score_maps(images).mean((2, 3))


def synthetic_teacher() -> nn.Module:
    return SyntheticTeacher()
