"""What backbones of several stages give to timm and to token labels: heads, mixing, features of each stage.

Legend: B images; C classes; D width of the last stage; h×w token grid, T = h·w tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

import torch
import torch.fx
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.patch_model import check_patches
from model.token_heads import Mix, TokenLabelHeads, mix_mask, mix_tokens

MIXED_PIXELS = 16  # side of a token of the stage in whose input tokens are mixed
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of features [B, h, w, C]
    "NCHW": lambda x: x.permute(0, 3, 1, 2),
    "NHWC": lambda x: x,
    "NLC": lambda x: x.flatten(1, 2),
}


@torch.fx.wrap
def check_images(images: torch.Tensor, in_chans: int, stride: int) -> None:
    """Raise ModelError unless images are [B, in_chans, height, width] and divide into tokens of `stride` pixels."""
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise ModelError(f"images do not fit: got {tuple(images.shape)}, expected [B, {in_chans}, height, width]")
    check_patches((images.shape[2], images.shape[3]), stride)


@torch.fx.wrap
def mix_cells(
    x: torch.Tensor, mix: Mix | None, grid: tuple[int, int], cells: int, layout: str = "NHWC"
) -> torch.Tensor:
    """Swap tokens of features between images.

    Args:
        x: [B, ·, ·, C] or, by `layout`, [B, C, ·, ·].
        mix: box or mask on `grid`; None: no mixing.
        grid: rows and columns of tokens.
        cells: rows, and columns, of `x` in a token.
        layout: "NHWC" or "NCHW".

    Returns:
        Features of the same shape.
    """
    if mix is None:
        return x
    maps = x if layout == "NCHW" else x.permute(0, 3, 1, 2)
    mask = mix_mask(mix, grid, x.device).repeat_interleave(cells, 0).repeat_interleave(cells, 1)
    maps = mix_tokens(maps, mask[: maps.shape[2], : maps.shape[3]])
    return maps if layout == "NCHW" else maps.permute(0, 2, 3, 1)


class Stage(Protocol):
    """Blocks on one grid, then the step to the next stage. A module that is called with features of the model's layout.

    Attributes:
        downsample: the step to the next stage; None: there is none.
        grad_checkpointing: recompute each block in the backward pass.
    """

    downsample: nn.Module | None
    grad_checkpointing: bool

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks alone: features to features of the same shape."""
        ...


class StageModel(TokenLabelHeads):
    """Stages, each on half the grid of the one before it; a class head on the mean of the last one's tokens.

    The token head, too, reads the last stage: it shares the class head's features, and token labels teach every block.
    Tokens are mixed where the stage begins whose tokens are 16×16 pixels (the last one with smaller tokens, if there is
    none): four of its tokens for a token twice as wide. Features are [B, h, w, D], or [B, D, h, w] with `output_fmt`
    "NCHW". Subclasses set the attributes.

    Attributes:
        STAGES: name of the attribute that holds the stages, as published.
        ROUNDS_UP: take images that do not divide into tokens, with a further row and column of tokens for the rest.
        output_fmt: the layout of features between stages.
        img_size: (height, width) in pixels.
        grid: (h, w) in tokens of the last stage, for images of `img_size`.
        stride: side of a token of the last stage, in pixels.
        in_chans: channels of the images.
        num_features: D.
        patch_embed: images to the tokens of the first stage.
        pos_drop: dropout on them.
        norm: the norm after the last stage.
        feature_info: timm's description of the stages.
    """

    STAGES = "layers"
    ROUNDS_UP = False
    output_fmt = "NHWC"
    img_size: tuple[int, int]
    grid: tuple[int, int]
    stride: int
    in_chans: int
    num_features: int
    patch_embed: nn.Module
    pos_drop: nn.Module
    norm: nn.Module
    feature_info: list[dict[str, Any]]

    @property
    def stages(self) -> nn.ModuleList:
        """The stages, under their published name `STAGES`."""
        return cast(nn.ModuleList, getattr(self, self.STAGES))

    def _grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        check_patches(size, 1 if self.ROUNDS_UP else self.stride)
        return self._cells(size, self.stride)

    @staticmethod
    def _cells(size: tuple[int, int], pixels: int) -> tuple[int, int]:
        """Rows and columns of tokens of `pixels` that cover an image of `size`."""
        return (size[0] + pixels - 1) // pixels, (size[1] + pixels - 1) // pixels

    def _channels_last(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the model's layout as [B, ·, ·, C]."""
        return features.permute(0, 2, 3, 1) if self.output_fmt == "NCHW" else features

    def grid_of(self, images: torch.Tensor) -> tuple[int, int]:
        """h, w of the token grid. Raises ModelError unless images are [B, in_chans, ·, ·] of a size that fits."""
        check_images(images, self.in_chans, 1 if self.ROUNDS_UP else self.stride)
        return self._cells((images.shape[2], images.shape[3]), self.stride)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, height, width] to the input of the first stage."""
        self.grid_of(images)
        return self.pos_drop(self.patch_embed(images))

    def forward_features(self, images: torch.Tensor, mix: Mix | None = None) -> torch.Tensor:
        """Run all stages and the norm.

        Args:
            images: [B, in_chans, height, width].
            mix: box or mask [h, w] of the tokens that the images swap; None: no mixing.

        Returns:
            Normalized features of the last stage, in the model's layout.
        """
        grid, x = self.grid_of(images), self.embed(images)
        sides = [info["reduction"] for info in self.feature_info]
        mixed = max(side for side in sides if side <= MIXED_PIXELS)
        for stage, side in zip(self.stages, sides, strict=False):
            x = stage(mix_cells(x, mix, grid, self.stride // side, self.output_fmt) if side == mixed else x)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of chosen stages, before the step to the next one, with timm's interface.

        Args:
            x: images [B, in_chans, height, width].
            indices: the stages, or how many of the last ones; None: all.
            norm: apply the norm to the last stage's features too.
            stop_early: do not run the stages after the last one of `indices`.
            output_fmt: "NCHW" or "NHWC" for maps, "NLC" for tokens.
            intermediates_only: return only the list of intermediate features.

        Returns:
            (final features, list of intermediate features), or the list alone.

        Raises:
            ModelError: an unknown `output_fmt`, or images that do not fit.
        """
        if output_fmt not in LAYOUTS:
            raise ModelError(f"unknown output_fmt: got {output_fmt!r}, expected one of {', '.join(LAYOUTS)}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        intermediates, end = [], len(self.stages) - 1
        x = self.embed(x)
        for i, stage in enumerate(cast(Iterable[Stage], self.stages)):
            x = stage.run_blocks(x)
            if i in wanted:
                features = self._channels_last(self.norm(x) if norm and i == end else x)
                intermediates.append(LAYOUTS[output_fmt](features))
            if stop_early and i == last:
                break
            x = x if stage.downsample is None else stage.downsample(x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if not stop_early or last == end else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages that `indices` do not need, with timm's interface.

        Args:
            indices: the stages to keep features of, or how many of the last ones.
            prune_norm: replace the last norm by Identity; so it is where the last stage goes, whose width it has.
            prune_head: remove the heads.

        Returns:
            The indices of the stages whose features are kept.
        """
        wanted, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last + 1 < len(self.stages):
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        setattr(self, self.STAGES, self.stages[: last + 1])
        self.stages[last].downsample = None
        return wanted

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Pool features for the class head: [B, D], or all of them where `global_pool` is ""."""
        return self._channels_last(features).mean((1, 2)) if self.global_pool == "avg" else features

    def token_logits(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply both heads to features of the model's layout.

        Returns:
            Class logits [B, C], or [B, h, w, C] where `global_pool` is "", and auxiliary logits [B, T, C]; None for the
            latter without an auxiliary head.
        """
        each = self._channels_last(features)
        aux = None if self.aux_head is None else self.aux_head(each.flatten(1, 2))
        return self.head(each if self.num_classes and not self.global_pool else self.pool(features)), aux

    def get_classifier(self) -> nn.Module:
        """The class head."""
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, aux_classes: int | None = None
    ) -> None:
        """Replace the class and auxiliary heads.

        Args:
            num_classes: classes of the class head; 0: remove both heads.
            global_pool: "avg" or ""; None: unchanged.
            aux_classes: classes of the auxiliary head; None: those of the class head.
        """
        if global_pool not in (None, "avg", ""):
            raise ModelError(
                f'unknown pooling: got global_pool={global_pool!r}, expected "avg" (the mean of all tokens) or ""'
            )
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = self._new_head(num_classes)
        self.reset_aux_head(aux_classes)

    def reset_aux_head(self, aux_classes: int | None = None) -> None:
        """Replace the auxiliary head alone; `aux_classes`: its classes, None: those of the class head."""
        self.aux_classes = aux_classes
        if self.aux_head is not None:
            self.aux_head = self._new_head(self.aux_outputs())

    def _new_head(self, classes: int) -> nn.Module:
        like = next(self.patch_embed.parameters())
        if not classes:
            return nn.Identity()
        return initialize(nn.Linear(self.num_features, classes, device=like.device, dtype=like.dtype))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of the blocks on or off."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]


def initialize(linear: nn.Linear) -> nn.Linear:
    """Normal weights of deviation 0.02, no bias. Returns the layer."""
    trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
