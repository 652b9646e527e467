"""Shared parts of patch backbones: grids, image sizes, position embeddings and classifiers, with timm's names.

Legend: B images; h×w token grid, T = h·w tokens; L = T + 1 sequence length; D model width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx
from timm.layers import to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from labeler.base.errors import ModelError
from model.token_heads import (
    Mix,
    TokenLabelHeads,
    insert_token,
    mix_tokens,
    resize_position_embedding,
    without_token,
)

torch.fx.wrap("mix_tokens")  # not traced through: it depends on whether there is a box

POOLS = ("token", "avg", "")


@torch.fx.wrap
def check_images(images: torch.Tensor, in_chans: int, img_size: tuple[int, int], patch: int) -> None:
    """Raise ModelError unless images are [B, in_chans, *img_size]. A function of its own, so that tracers skip it."""
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise ModelError(f"images do not fit: got {tuple(images.shape)}, expected [B, {in_chans}, height, width]")
    size = (images.shape[2], images.shape[3])
    if size != img_size:
        check_patches(size, patch)
        raise ModelError(
            f"images do not fit: got {size[0]}×{size[1]} pixels, expected {img_size[0]}×{img_size[1]}; "
            "create the model with img_size=, or call model.set_input_size()"
        )


def check_patches(size: tuple[int, int], patch: int) -> None:
    """Raise ModelError unless an image of `size` (height, width) divides into patches of side `patch`."""
    if any(side < patch or side % patch for side in size):
        raise ModelError(
            f"the image does not divide into patches: got {size[0]}×{size[1]} pixels, expected multiples of {patch}"
        )


def check_pool(global_pool: str) -> str:
    """Return `global_pool`. Raises ModelError if it is unknown."""
    if global_pool not in POOLS:
        raise ModelError(
            f"unknown pooling: got global_pool={global_pool!r}, "
            'expected "token" (the class token), "avg" (the mean of the others) or "" (none)'
        )
    return global_pool


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rates of stochastic depth of `depth` blocks, linearly from 0 to `last`.

    timm's `calculate_drop_path_rates` has the same rule, but reads the rates from a tensor, which fails under fake
    tensors, and rounds them to the default dtype.
    """
    return [last * i / max(1, depth - 1) for i in range(depth)]


class PatchModel(TokenLabelHeads):
    """A backbone that runs patch tokens and one class token through a list of blocks. Subclasses set the attributes.

    Attributes:
        BLOCKS: name of the attribute that holds the blocks, [B, L, D] -> [B, L, D], as published.
        NORM: name of the norm after them, as published.
        img_size: (height, width) in pixels.
        grid: (h, w) in tokens.
        in_chans: channels of the images.
        embed_dim: model width D.
        patch_embed: images to tokens [B, D, h, w].
        cls_token: [1, 1, D].
        pos_embed: [1, L, D], added before `pos_drop`.
        pos_drop: dropout on the embedded sequence.
        dynamic_img_size: take images of any size that divides into patches, with a resized copy of the position
            embedding at each call.
        grad_checkpointing: recompute each block in the backward pass.
    """

    BLOCKS: str
    NORM: str
    img_size: tuple[int, int]
    grid: tuple[int, int]
    in_chans: int
    embed_dim: int
    patch_embed: Any
    cls_token: nn.Parameter
    pos_embed: nn.Parameter
    pos_drop: nn.Module
    dynamic_img_size = False
    grad_checkpointing: bool

    def _grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        patch = self.patch_embed.patch_size
        check_patches(size, patch)
        return size[0] // patch, size[1] // patch

    def grid_of(self, images: torch.Tensor) -> tuple[int, int]:
        """h, w of the token grid. Raises ModelError unless images are of `img_size`, or of any size that fits."""
        if self.dynamic_img_size:
            return self._grid_for((images.shape[2], images.shape[3]))
        check_images(images, self.in_chans, self.img_size, self.patch_embed.patch_size)
        return self.grid

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size and resize the position embedding to fit.

        Args:
            img_size: side, or (height, width), in pixels.

        Raises:
            ModelError: the size does not divide into patches.
        """
        size = to_2tuple(img_size)
        grid, index = self._grid_for(size), self.cls_position(self.pos_embed.shape[1])
        new_index = self.cls_position(math.prod(grid) + 1)
        embedding = resize_position_embedding(self.pos_embed.data, self.grid, grid, index, new_index)
        self.pos_embed = nn.Parameter(embedding, requires_grad=self.pos_embed.requires_grad)
        self.img_size, self.grid = size, grid

    def embed(self, images: torch.Tensor, mix: Mix | None = None) -> torch.Tensor:
        """Images [B, in_chans, height, width] to the input [B, L, D] of the first block; `mix`: tokens to swap."""
        grid = self.grid_of(images)
        tokens = mix_tokens(self.patch_embed(images), mix).flatten(2).mT
        position = self.cls_position(tokens.shape[1] + 1)
        sequence = insert_token(tokens, self.cls_token.to(tokens.dtype), position)
        return self.pos_drop(sequence + (self._positions(grid) if self.dynamic_img_size else self.pos_embed))

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The position embedding [1, L, D] for another grid."""
        old, new = (self.cls_position(math.prod(one) + 1) for one in (self.grid, grid))
        return resize_position_embedding(self.pos_embed, self.grid, grid, old, new)

    def _run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward_features(self, images: torch.Tensor, mix: Mix | None = None) -> torch.Tensor:
        """Run all blocks and the norm.

        Args:
            images: [B, in_chans, height, width].
            mix: box or mask of the tokens that the images swap; None: no mixing.

        Returns:
            Normalized features [B, L, D], the class token at `cls_position(L)`.
        """
        x = self.embed(images, mix)
        for block in getattr(self, self.BLOCKS):
            x = self._run(block, x)
        return getattr(self, self.NORM)(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features after chosen blocks, with timm's interface.

        Args:
            x: images [B, in_chans, height, width].
            indices: the blocks, or how many of the last ones; None: all.
            return_prefix_tokens: return pairs of features and class token [B, 1, D].
            norm: apply the norm to the intermediate features too.
            stop_early: do not run the blocks after the last one of `indices`.
            output_fmt: "NCHW" for maps [B, D, h, w], "NLC" for tokens [B, T, D].
            intermediates_only: return only the list of intermediate features.

        Returns:
            (final features [B, L, D], list of intermediate features), or the list alone.

        Raises:
            ModelError: an unknown `output_fmt`, or images that do not fit.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ModelError(f'unknown output_fmt: got {output_fmt!r}, expected "NCHW" or "NLC"')
        blocks, last_norm = getattr(self, self.BLOCKS), getattr(self, self.NORM)
        wanted, last = feature_take_indices(len(blocks), indices)
        grid, intermediates = self.grid_of(x), []
        x = self.embed(x)
        for i, block in enumerate(blocks[: last + 1] if stop_early else blocks):
            x = self._run(block, x)
            if i in wanted:
                total = last_norm(x) if norm else x
                index = self.cls_position(total.shape[1])
                tokens = without_token(total, index)
                tokens = tokens.mT.unflatten(2, grid) if output_fmt == "NCHW" else tokens
                intermediates.append((tokens, total[:, index : index + 1]) if return_prefix_tokens else tokens)
        return intermediates if intermediates_only else (last_norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks that `indices` do not need, with timm's interface.

        Args:
            indices: the blocks to keep features of, or how many of the last ones.
            prune_norm: replace the last norm by Identity.
            prune_head: remove the heads.

        Returns:
            The indices of the blocks whose features are kept.
        """
        blocks = getattr(self, self.BLOCKS)
        wanted, last = feature_take_indices(len(blocks), indices)
        setattr(self, self.BLOCKS, blocks[: last + 1])
        if prune_norm:
            setattr(self, self.NORM, nn.Identity())
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def get_classifier(self) -> nn.Module:
        """The class head."""
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, aux_classes: int | None = None
    ) -> None:
        """Replace the class and auxiliary heads.

        Args:
            num_classes: classes of the class head; 0: remove both heads.
            global_pool: as in `TokenLabelHeads`; None: unchanged.
            aux_classes: classes of the auxiliary head; None: those of the class head.
        """
        if global_pool is not None:
            self.global_pool = check_pool(global_pool)
        self.num_classes = num_classes
        if self.head is not None:
            self.head = self._new_head(num_classes)
        self.reset_aux_head(aux_classes)

    def reset_aux_head(self, aux_classes: int | None = None) -> None:
        """Replace the auxiliary head alone; `aux_classes`: its classes, None: those of the class head."""
        self.aux_classes = aux_classes
        if self.aux_head is not None:
            self.aux_head = self._new_head(self.aux_outputs())

    def _new_head(self, classes: int) -> nn.Module:
        if not classes:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, classes, device=self.pos_embed.device, dtype=self.pos_embed.dtype)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of the blocks on or off."""
        self.grad_checkpointing = enable
