"""Parts of MambaVision: the stem, blocks of convolutions, blocks of a mixer or attention on windows, and levels.

Parameters have the published names.

Legend: B images; h×w grid of a level; C its width; W windows of all images; L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx
from timm.layers import Attention, DropPath, Mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.mixers.mambavision import MambaVisionMixer

Window = tuple[int, int]
STEM_EPS, NORM_EPS = 1e-4, 1e-5


@torch.fx.wrap
def to_windows(x: torch.Tensor, window: Window) -> torch.Tensor:
    """Cut maps into windows, after padding with zeros below and to the right, as published: no token is masked.

    Args:
        x: [B, C, h, w].
        window: rows and columns of a window.

    Returns:
        [W, L, C], the windows of an image after each other.
    """
    rows, columns = window
    x = F.pad(x, (0, -x.shape[3] % columns, 0, -x.shape[2] % rows))
    x = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


@torch.fx.wrap
def from_windows(windows: torch.Tensor, window: Window, like: torch.Tensor) -> torch.Tensor:
    """Join windows [W, L, C] to maps [B, C, h, w] of the size of `like`, without the padding."""
    rows, columns = window
    height, width = like.shape[2], like.shape[3]
    down, across = (height + rows - 1) // rows, (width + columns - 1) // columns
    x = windows.unflatten(1, (rows, columns)).unflatten(0, (-1, down, across))
    x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return x[:, :, :height, :width]


class Stem(nn.Module):
    """Two convolutions, each on half the resolution of the one before it, or the second on the same.

    Args:
        in_chans: channels of the images.
        hidden: channels of the first convolution.
        width: channels of the second one.
        patch_size: 4, or 2: the second convolution keeps the resolution.
    """

    def __init__(self, in_chans: int, hidden: int, width: int, patch_size: int = 4) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_chans, hidden, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(hidden, eps=STEM_EPS),
            nn.ReLU(),
            nn.Conv2d(hidden, width, 3, stride=patch_size // 2, padding=1, bias=False),
            nn.BatchNorm2d(width, eps=STEM_EPS),
            nn.ReLU(),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, in_chans, height, width] -> [B, C, h, w]."""
        return self.conv_down(images)


class Downsample(nn.Module):
    """A convolution to half the resolution and twice the width.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, 2·C, h / 2, w / 2], odd sides rounded up."""
        return self.reduction(x)


class ConvBlock(nn.Module):
    """Two 3×3 convolutions beside the input.

    Args:
        width: C.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, width: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width, eps=NORM_EPS)
        self.act1 = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width, eps=NORM_EPS)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        inner = self.act1(self.norm1(self.conv1(x)))
        return x + self.drop_path(self.norm2(self.conv2(inner)))


class Block(nn.Module):
    """A mixer or attention, then an MLP, on the tokens of windows.

    Args:
        width: C.
        num_heads: heads of the attention; 0: MambaVision's mixer.
        mlp_ratio: hidden width of the MLP / C.
        drop: dropout after the attention and in the MLP.
        drop_path: rate of stochastic depth.
        layer_scale: initial factor of each channel of both branches; None: none.
        backend: backend of the mixer's scan.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 0,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mixer: nn.Module = (
            Attention(width, num_heads, qkv_bias=True, proj_drop=drop)
            if num_heads
            else MambaVisionMixer(width, backend=backend)
        )
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(mlp_ratio * width), act_layer=nn.GELU, drop=drop)
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[W, L, C] -> [W, L, C]."""
        mixed = self.mixer(self.norm1(x))
        x = x + self.drop_path(mixed if self.gamma_1 is None else mixed * self.gamma_1)
        inner = self.mlp(self.norm2(x))
        return x + self.drop_path(inner if self.gamma_2 is None else inner * self.gamma_2)


class Level(nn.Module):
    """Blocks on one grid, then the step to the next level, if there is one.

    Args:
        blocks: the blocks, on maps or on windows.
        window: rows and columns of the windows that the blocks work on; None: they work on maps.
        downsample: the step to the next level; None: there is none.

    Attributes:
        grad_checkpointing: recompute each block in the backward pass.
    """

    def __init__(self, blocks: Sequence[nn.Module], window: Window | None, downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.window, self.downsample, self.grad_checkpointing = window, downsample, False

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks alone: [B, C, h, w] -> [B, C, h, w]."""
        inner = x if self.window is None else to_windows(x, self.window)
        for block in self.blocks:
            again = self.grad_checkpointing and torch.is_grad_enabled()
            inner = checkpoint(block, inner, use_reentrant=False) if again else block(inner)
        return inner if self.window is None else from_windows(inner, self.window, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, 2·C, h / 2, w / 2], odd sides rounded up, or [B, C, h, w] of the last level."""
        x = self.run_blocks(x)
        return x if self.downsample is None else self.downsample(x)
