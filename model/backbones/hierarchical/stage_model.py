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
def mix_cells(x: torch.Tensor, mix: Mix | None, cells: int) -> torch.Tensor:
    """Swap tokens of x [B, h, w, C] between images; `mix` is on a grid whose tokens are `cells` rows and columns."""
    if mix is None:
        return x
    mask = mix_mask(mix, (x.shape[1] // cells, x.shape[2] // cells), x.device)
    mask = mask.repeat_interleave(cells, 0).repeat_interleave(cells, 1)
    return mix_tokens(x.permute(0, 3, 1, 2), mask).permute(0, 2, 3, 1)


class Stage(Protocol):
    """Blocks on one grid, then the step to the next stage. A module that is called with [B, ·, ·, C].

    Attributes:
        downsample: the step to the next stage; None: there is none.
        grad_checkpointing: recompute each block in the backward pass.
    """

    downsample: nn.Module | None
    grad_checkpointing: bool

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks alone: [B, ·, ·, C] -> [B, ·, ·, C]."""
        ...


class StageModel(TokenLabelHeads):
    """Stages, each on half the grid of the one before it; a class head on the mean of the last one's tokens.

    The token head, too, reads the last stage: it shares the class head's features, and token labels teach every block.
    Tokens are mixed where the stage begins whose tokens are 16×16 pixels (the last one with smaller tokens, if there is
    none): four of its tokens for a token twice as wide. Features are [B, h, w, D]. Subclasses set the attributes.

    Attributes:
        img_size: (height, width) in pixels.
        grid: (h, w) in tokens of the last stage, for images of `img_size`.
        stride: side of a token of the last stage, in pixels.
        in_chans: channels of the images.
        num_features: D.
        patch_embed: images to the tokens of the first stage, [B, ·, ·, C].
        pos_drop: dropout on them.
        layers: the stages.
        norm: the norm after the last stage.
        feature_info: timm's description of the stages.
    """

    output_fmt = "NHWC"
    img_size: tuple[int, int]
    grid: tuple[int, int]
    stride: int
    in_chans: int
    num_features: int
    patch_embed: nn.Module
    pos_drop: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    feature_info: list[dict[str, Any]]

    def _grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        check_patches(size, self.stride)
        return size[0] // self.stride, size[1] // self.stride

    def grid_of(self, images: torch.Tensor) -> tuple[int, int]:
        """h, w of the token grid. Raises ModelError unless images are [B, in_chans, ·, ·] of a size that divides."""
        check_images(images, self.in_chans, self.stride)
        return images.shape[2] // self.stride, images.shape[3] // self.stride

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, height, width] to the input [B, ·, ·, C] of the first stage."""
        check_images(images, self.in_chans, self.stride)
        return self.pos_drop(self.patch_embed(images))

    def forward_features(self, images: torch.Tensor, mix: Mix | None = None) -> torch.Tensor:
        """Run all stages and the norm.

        Args:
            images: [B, in_chans, height, width].
            mix: box or mask [h, w] of the tokens that the images swap; None: no mixing.

        Returns:
            Normalized features [B, h, w, D].
        """
        x, sides = self.embed(images), [info["reduction"] for info in self.feature_info]
        mixed = max(side for side in sides if side <= MIXED_PIXELS)
        for stage, side in zip(self.layers, sides, strict=False):
            x = stage(mix_cells(x, mix, self.stride // side) if side == mixed else x)
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
            (final features [B, h, w, D], list of intermediate features), or the list alone.

        Raises:
            ModelError: an unknown `output_fmt`, or images that do not fit.
        """
        if output_fmt not in LAYOUTS:
            raise ModelError(f"unknown output_fmt: got {output_fmt!r}, expected one of {', '.join(LAYOUTS)}")
        wanted, last = feature_take_indices(len(self.layers), indices)
        intermediates, end = [], len(self.layers) - 1
        x = self.embed(x)
        for i, stage in enumerate(cast(Iterable[Stage], self.layers)):
            x = stage.run_blocks(x)
            if i in wanted:
                intermediates.append(LAYOUTS[output_fmt](self.norm(x) if norm and i == end else x))
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
            prune_norm: replace the last norm by Identity.
            prune_head: remove the heads.

        Returns:
            The indices of the stages whose features are kept.
        """
        wanted, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        self.layers[last].downsample = None
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Pool features [B, h, w, D] for the class head: [B, D], or all of them where `global_pool` is ""."""
        return features.mean((1, 2)) if self.global_pool == "avg" else features

    def token_logits(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply both heads to features [B, h, w, D].

        Returns:
            Class logits [B, C] and auxiliary logits [B, T, C]; None for the latter without an auxiliary head.
        """
        aux = None if self.aux_head is None else self.aux_head(features.flatten(1, 2))
        return self.head(self.pool(features)), aux

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
        for stage in self.layers:
            stage.grad_checkpointing = enable  # type: ignore[assignment]


def initialize(linear: nn.Linear) -> nn.Linear:
    """Normal weights of deviation 0.02, no bias. Returns the layer."""
    trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
