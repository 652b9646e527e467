"""Any nn.Module as a teacher: a function without arguments that returns it, named `module:function`.

python -m labeler label IMAGES --store labels --teacher own_teacher:build --checkpoint weights.safetensors

in the folder of this file, or with it on PYTHONPATH. From Python, here with random weights:

python own_teacher.py IMAGES STORE
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from labeler import LabelerConfig, TeacherConfig, label_images

CLASSES = 10


class OwnTeacher(nn.Module):
    """A small classifier that ends in global average pooling and a linear layer.

    The labeler applies such a head to each place of the last feature map by itself, and checks that the mean of the map
    is what the network answers. A network that ends otherwise says itself what its map is: with `score_maps`, as here.
    """

    num_classes = CLASSES
    # How it wants its images; without it, ImageNet's mean and std and 224 pixels.
    default_cfg = {
        "input_size": (3, 128, 128), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        layers, width = [], 3
        for wider in (16, 32, 64, 128):
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.GELU()]
            width = wider
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, CLASSES)

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] -> logits [B, C, H, W]."""
        return self.head(self.body(images).movedim(1, -1)).movedim(-1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] -> logits [B, C]."""
        return self.score_maps(images).mean((2, 3))


def build() -> nn.Module:
    """The teacher; the labeler loads `--checkpoint` into it and sets it to evaluation."""
    torch.manual_seed(0)
    return OwnTeacher()


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(label_images(sys.argv[1], sys.argv[2], LabelerConfig(TeacherConfig("own_teacher:build"))))


if __name__ == "__main__":
    main()
