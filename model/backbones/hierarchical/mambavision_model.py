"""MambaVision as a backbone with timm's interface and a token head; `mambavision` beside it registers its sizes.

Legend: B images; C classes; D width of the last level; h×w token grid, T = h·w tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from timm.layers import to_2tuple
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.hierarchical.mambavision_layers import NORM_EPS, Block, ConvBlock, Downsample, Level, Stem
from model.backbones.hierarchical.stage_model import StageModel, initialize
from model.backbones.patch_model import drop_path_rates
from model.mixers.mambavision import MambaVisionMixer

ON_WINDOWS = 2  # the last levels, which mix tokens in windows; those before them are convolutions


class MambaVision(StageModel):
    """Levels, each on half the grid of the one before it: convolutions, then mixers and attention on windows.

    Of the last two levels, the first half of the blocks are mixers and the others attention (of an odd number, one more
    mixers). Both heads read the last level: the class head the mean of its tokens, the token head each of them, so that
    token labels teach every block. Images may have any size: sides of tokens are rounded up, and maps are padded to
    whole windows, whose tokens are not masked.

    Args:
        img_size: side, or (height, width), in pixels, for which `grid` and the windows are chosen.
        patch_size: side of a token of the first level, in pixels: 4, as published, or 2.
        in_chans: channels of the images.
        num_classes: classes of the class head; 0: no heads.
        embed_dim: width of the first level; it doubles from level to level.
        stem_width: channels of the stem's first convolution.
        depths: number of blocks of each level.
        num_heads: attention heads of each level, of which the last two have attention.
        window_size: side of the windows of each level, of which the last two have windows; None: one window is a whole
            image of `img_size`, as in all published networks.
        mlp_ratio: hidden width of the MLP / width.
        layer_scale: initial factor of each channel of a branch in the last two levels; None: none.
        aux_head: add an auxiliary head on the tokens.
        drop_rate: dropout in attention and MLPs.
        drop_path_rate: rate of stochastic depth in the last block; the rates rise linearly from 0 in the first.
        global_pool: input of the class head: "avg", the mean of the tokens, or "", every token.
        backend: backend of the scan, see `model.ops.selective_scan`.
        aux_classes: classes of the auxiliary head, if they are others, as those of a teacher are; None: the same
            classes.

    Raises:
        ModelError: settings of another number of levels, widths that do not divide, an unknown global_pool or
            patch_size.
    """

    STAGES, ROUNDS_UP, output_fmt = "levels", True, "NCHW"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 80,
        stem_width: int = 64,
        depths: Sequence[int] = (1, 3, 8, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_size: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        aux_head: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        backend: str = "auto",
        aux_classes: int | None = None,
    ) -> None:
        super().__init__()
        _check_levels(depths, num_heads, window_size, patch_size)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.in_chans, self.embed_dim, self.patch_size = in_chans, embed_dim, patch_size
        self.num_features = self.head_hidden_size = widths[-1]
        self.num_prefix_tokens, self.stride = 0, patch_size * 2 ** (len(widths) - 1)
        self.patch_embed, self.pos_drop = Stem(in_chans, stem_width, embed_dim, patch_size), nn.Identity()
        all_rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        options = {"mlp_ratio": mlp_ratio, "drop": drop_rate, "layer_scale": layer_scale, "backend": backend}
        self.levels = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            rates = [next(all_rates) for _ in range(depth)]
            step = None if i + 1 == len(depths) else Downsample(width)
            if i < len(depths) - ON_WINDOWS:
                level = Level([ConvBlock(width, rate) for rate in rates], None, step)
            else:
                level = Level(_mixed_blocks(width, num_heads[i], rates, **options), (1, 1), step)
            self.levels.append(level)
        self.window_size = None if window_size is None else tuple(window_size)
        self.set_input_size(img_size)
        self.norm: nn.Module = nn.BatchNorm2d(self.num_features, eps=NORM_EPS)
        self.head: nn.Module = nn.Identity()
        self.aux_head: nn.Module | None = nn.Identity() if aux_head else None
        self.feature_info = [
            {"num_chs": width, "reduction": patch_size * 2**i, "module": f"levels.{i}.blocks.{depths[i] - 1}"}
            for i, width in enumerate(widths)
        ]
        for module in self.levels.modules():  # convolutions keep torch's initialization
            if isinstance(module, nn.Linear):
                initialize(module)
        self.reset_classifier(num_classes, global_pool, aux_classes)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size, and with it `grid` and, unless `window_size` was given, the windows.

        Args:
            img_size: side, or (height, width), in pixels.

        Raises:
            ModelError: a side below one pixel.
        """
        size = to_2tuple(img_size)
        self.img_size, self.grid = size, self._grid_for(size)
        for i, level in enumerate(cast(Iterable[Level], self.levels)):
            if level.window is not None:
                whole = self._cells(size, self.patch_size * 2**i)
                level.window = whole if self.window_size is None else to_2tuple(self.window_size[i])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay; timm adds norms and biases."""
        mixers = [(path, module) for path, module in self.named_modules() if isinstance(module, MambaVisionMixer)]
        return {f"{path}.{name}" for path, mixer in mixers for name in mixer.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, for layer-wise learning rates: by block, or by level if `coarse`."""
        blocks = [(r"^levels\.(\d+)\.blocks\.(\d+)", None), (r"^levels\.(\d+)\.downsample", (99999,))]
        blocks = [(r"^levels\.(\d+)", None)] if coarse else blocks
        return {"stem": r"^patch_embed", "blocks": [*blocks, (r"^norm", (99999,))]}


def _check_levels(
    depths: Sequence[int], num_heads: Sequence[int], windows: Sequence[int] | None, patch_size: int
) -> None:
    """Raise ModelError unless each of two or more levels has its settings, and the stem can make such tokens."""
    counts = {len(depths), len(num_heads), len(depths if windows is None else windows)}
    if len(counts) > 1 or len(depths) < ON_WINDOWS or min(*depths, *num_heads, *(windows or ())) < 1:
        raise ModelError(
            "levels need blocks, heads and windows, each at least 1",
            got=f"depths={tuple(depths)}, num_heads={tuple(num_heads)}, window_size={windows and tuple(windows)}",
            expected=f"as many of each, for {ON_WINDOWS} levels or more",
        )
    if patch_size not in (2, 4):
        raise ModelError(f"the stem cannot make such tokens: got patch_size={patch_size}, expected 4 or 2")


def _mixed_blocks(width: int, num_heads: int, rates: list[float], **options: Any) -> list[Block]:
    """Blocks of a level on windows: mixers, then as many with attention, or one fewer; `rates`: of stochastic depth."""
    if width % num_heads:
        raise ModelError(
            f"a level's width is not a multiple of its num_heads: got width {width}, num_heads {num_heads}"
        )
    mixers = len(rates) - len(rates) // 2
    heads = [0] * mixers + [num_heads] * (len(rates) // 2)
    return [Block(width, count, drop_path=rate, **options) for count, rate in zip(heads, rates, strict=True)]
