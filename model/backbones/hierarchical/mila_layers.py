"""The layers of MILA: its stem, the block around its attention, and the step from one stage to the next.

Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective" (2024). Parameters have the published names.

Legend: B images; h×w grid of a stage; C its width; P side of a patch.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath, Mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from labeler.base.errors import ModelError
from model.backbones.hierarchical.mila_attention import LinearAttention, on_map

NORM_EPS = 1e-5
NEXT = 4  # hidden width of the step to the next stage / width of that stage
STEM = 4  # hidden width of the stem's end / its output's


class ConvLayer(nn.Module):
    """A convolution, a BatchNorm and a ReLU; the last two only where they are asked for. [B, C, h, w]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, outputs, h / stride, w / stride]."""
        return self.act(self.norm(self.conv(x)))


class Stem(nn.Module):
    """Convolutions from an image to tokens: a step of stride 2, two at half resolution, a step of stride P / 2.

    Args:
        in_chans: channels of the images.
        width: C of the first stage.
        patch_size: P, 4 or 2 pixels.

    Raises:
        ModelError: another patch_size.
    """

    def __init__(self, in_chans: int, width: int, patch_size: int = 4) -> None:
        super().__init__()
        if patch_size not in (2, 4):
            raise ModelError("the stem has two steps", got=f"patch_size={patch_size}", expected="4 or 2")
        half = width // 2
        self.conv1 = ConvLayer(in_chans, half, stride=2, bias=False)
        self.conv2 = nn.Sequential(ConvLayer(half, half, bias=False), ConvLayer(half, half, bias=False, act=False))
        self.conv3 = nn.Sequential(
            ConvLayer(half, STEM * width, stride=patch_size // 2, bias=False),
            ConvLayer(STEM * width, width, kernel=1, bias=False, act=False),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, in_chans, P·h, P·w] -> [B, h, w, C]."""
        x = self.conv1(images)
        return self.conv3(x + self.conv2(x)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """The step to the next stage: half the grid, twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 2 * NEXT * width
        self.conv = nn.Sequential(
            ConvLayer(width, hidden, kernel=1, norm=False),
            ConvLayer(hidden, hidden, stride=2, groups=hidden, norm=False),
            ConvLayer(hidden, 2 * width, kernel=1, act=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 2·h, 2·w, C] -> [B, h, w, 2·C]."""
        return on_map(self.conv, x)


class Block(nn.Module):
    """Linear attention within Mamba's gated block, and an MLP; before each, a convolution that sees positions.

    Args:
        width: C.
        num_heads: heads of the attention.
        grid: h, w of the rotations that are kept.
        mlp_ratio: hidden width of the MLP / C.
        qkv_bias: whether queries and keys have a bias.
        drop: dropout in the MLP.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        grid: tuple[int, int],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.cpe1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.in_proj = nn.Linear(width, width)
        self.act_proj = nn.Linear(width, width)
        self.dwc = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.attn = LinearAttention(width, num_heads, grid, qkv_bias)
        self.out_proj = nn.Linear(width, width)
        self.drop_path = DropPath(drop_path)
        self.cpe2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(mlp_ratio * width), act_layer=nn.GELU, drop=drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, h, w, C] -> [B, h, w, C]."""
        x = x + on_map(self.cpe1, x)
        normed = self.norm1(x)
        attended = self.attn(F.silu(on_map(self.dwc, self.in_proj(normed))))
        x = x + self.drop_path(self.out_proj(attended * F.silu(self.act_proj(normed))))
        x = x + on_map(self.cpe2, x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks on one grid, then the step to the next stage, if there is one.

    Args:
        width: C.
        grid: h, w of the rotations that are kept.
        rates: rate of stochastic depth of each block.
        num_heads: heads of the attention.
        last: whether no stage follows.
        options: further arguments of the blocks.

    Raises:
        ModelError: the width is not a multiple of 4 and of num_heads.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], rates: list[float], num_heads: int, last: bool, **options: float
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads or width % 4:
            raise ModelError(
                "the width of a stage does not divide",
                got=f"width {width} with num_heads={num_heads}",
                expected="a multiple of num_heads and of 4",
                remedy="Set embed_dim or num_heads.",
            )
        self.blocks = nn.ModuleList([Block(width, num_heads, grid, drop_path=rate, **options) for rate in rates])  # type: ignore[arg-type]
        self.downsample = None if last else Downsample(width)
        self.grad_checkpointing = False

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks alone: [B, h, w, C] -> [B, h, w, C]."""
        for block in self.blocks:
            again = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, h, w, C] -> [B, h / 2, w / 2, 2·C], or [B, h, w, C] of the last stage."""
        x = self.run_blocks(x)
        return x if self.downsample is None else self.downsample(x)
