"""Teachers that tell less: the same network, its map averaged to fewer cells, or of five classes in each cell.

`label --teacher scripts.evidence.teachers:whole --checkpoint RUN/timm/model.safetensors` gives the network's answer for
the whole picture, in a single cell: token labels without place.
"""

from __future__ import annotations

import timm
import torch
from torch import nn
from torch.nn import functional as F

NETWORK = "tf_efficientnet_lite1"
CLASSES = 10


def whole() -> nn.Module:
    """One answer for the picture."""
    return averaged(1)


def cells_2() -> nn.Module:
    """A map of 2×2 cells."""
    return averaged(2)


def top_five() -> nn.Module:
    """Of each cell the five largest logits, and 0 for all others, which is how the reference reads its files."""
    net = timm.create_model(NETWORK, num_classes=CLASSES)

    def score_maps(images: torch.Tensor) -> torch.Tensor:
        logits = classified(net, net.forward_features(images))
        largest = logits.topk(5, dim=1)
        return torch.zeros_like(logits).scatter(1, largest.indices, largest.values)

    net.score_maps = score_maps
    return net


def averaged(cells: int) -> nn.Module:
    """The network without weights; its `score_maps` averages features in cells×cells parts first."""
    net = timm.create_model(NETWORK, num_classes=CLASSES)

    def score_maps(images: torch.Tensor) -> torch.Tensor:
        return classified(net, F.adaptive_avg_pool2d(net.forward_features(images), cells))

    net.score_maps = score_maps
    return net


def classified(net: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """The logits [B, C, H, W] of features at each place."""
    logits: torch.Tensor = net.classifier(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return logits
