"""Images to patch tokens: the convolutional stem of LV-ViT and DeMansia, and the plain projection of Vim.

Legend: B images; P patch side; h×w token grid; D model width.
"""

from __future__ import annotations

import torch
from torch import nn

from labeler.base.errors import ModelError


class ConvStem(nn.Module):
    """Three convolutions at half resolution, then a linear projection of P/2 × P/2 blocks; a patch sees its neighbors.

    Jiang et al., "All Tokens Matter" (2021).

    Args:
        in_chans: channels of the images.
        embed_dim: model width D.
        patch_size: P in pixels; even.
        hidden: channels of the three convolutions.

    Raises:
        ModelError: an odd patch_size.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int = 16, hidden: int = 64) -> None:
        super().__init__()
        if patch_size % 2 or patch_size < 2:
            raise ModelError("the stem halves the image", got=f"patch_size={patch_size}", expected="an even number")
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(in_chans, hidden, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act1 = nn.ReLU()  # one module each, as quantizers and DeepLift need
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(hidden)
        self.act3 = nn.ReLU()
        self.proj = nn.Conv2d(hidden, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, in_chans, P·h, P·w] -> [B, D, h, w]."""
        x = self.act1(self.bn1(self.conv1(images)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.act3(self.bn3(self.conv3(x)))
        return self.proj(x)


class PatchProjection(nn.Module):
    """One linear projection of each patch.

    Args:
        in_chans: channels of the images.
        embed_dim: model width D.
        patch_size: P in pixels.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int = 16) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, in_chans, P·h, P·w] -> [B, D, h, w]."""
        return self.proj(images)
