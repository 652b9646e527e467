"""Applies a classifier's own head to every location of its last features: maps in either layout, or tokens.

Tokens are arranged in their grid, which only works if the tokens without a location (class token, registers) are in
front of the others. `HeadPerLocation.order_fault` finds networks where they are not: their maps would be shifted.

Legend: B batch, C classes, H×W map grid, T = H·W patch tokens, P prefix tokens, D feature width, S side of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from labeler.base.errors import TeacherError

CHUNK_VALUES = 1 << 25
SAME_LOGITS = 1e-3
GIVE_SCORE_MAPS = "Give the module a score_maps(images) method that returns logits [B, C, H, W]."


class HeadPerLocation:
    """Applies timm's `forward_head` to each location alone, for all kinds of features.

    Args:
        model: A timm model.
        layout: "NCHW" and "NHWC" features become 1×1 maps. "tokens" [B, P + T, D] lose their prefix, and each token is
            repeated, so that the class token, the mean, the maximum and attention over the tokens are that token.
    """

    def __init__(self, model: Any, layout: str) -> None:
        self.features: Callable[[Tensor], Tensor] = model.forward_features
        self.head: Callable[[Tensor], Tensor] = model.forward_head
        self.layout = layout
        self.prefix: int | None = getattr(model, "num_prefix_tokens", None)
        self.patch_grid: tuple[int, int] | None = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        self.method = f"forward_head on every location of the {layout} features"

    def __call__(self, images: Tensor) -> Tensor:
        """Computes logits [B, C, H, W] of images [B, 3, S, S]."""
        return self.scores(self.features(images))

    def scores(self, features: Tensor) -> Tensor:
        """Computes logits [B, C, H, W] of features in this layout, `CHUNK_VALUES` at a time."""
        cells, grid = self.cells(features)
        chunks = cells.split(max(1, CHUNK_VALUES // cells[0].numel()))
        logits = torch.cat([self.head(chunk) for chunk in chunks])
        return logits.unflatten(0, (len(features), *grid)).permute(0, 3, 1, 2)

    def cells(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Returns the locations as a batch, [B·H·W, D, 1, 1], [B·H·W, 1, 1, D] or [B·T, P + 1, D]; and the grid."""
        if self.layout == "tokens":
            prefix, grid = token_grid(features.shape[1], self.prefix, self.patch_grid)
            tokens = features[:, prefix:].flatten(0, 1)
            # Never fewer than two: some heads skip a class token that they do not declare.
            return tokens[:, None].expand(-1, max(prefix, 1) + 1, -1), grid
        if self.layout == "NHWC":
            return features.flatten(0, 2)[:, None, None], (features.shape[1], features.shape[2])
        return features.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None], (features.shape[2], features.shape[3])

    def order_fault(self, features: Tensor) -> str | None:
        """Checks that the prefix is in front of the patch tokens.

        A head that reads a class token in front, or pools the tokens after it, returns the same logits when the patch
        tokens are permuted. If the module declares no prefix, the logits must also change when all tokens are permuted.

        Args:
            features: Tokens [B, P + T, D].

        Returns:
            What speaks against it, or None.
        """
        if self.layout != "tokens":
            return None
        prefix, _ = token_grid(features.shape[1], self.prefix, self.patch_grid)
        if prefix == 0:
            return None
        # Features of untrained networks may be nearly the same everywhere; noise differs at every location.
        noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
        logits = self.head(noise)
        negligible = SAME_LOGITS * (logits[0] - logits[1]).abs().max()
        patches_moved = self.head(torch.cat([noise[:, :prefix], noise[:, prefix:].roll(1, 1)], 1))
        if (patches_moved - logits).abs().max() > negligible:
            return "a head that depends on the order of patch tokens"
        if self.prefix is None and (self.head(noise.roll(1, 1)) - logits).abs().max() <= negligible:
            return "no num_prefix_tokens, and a head that treats all tokens alike"
        return None


class HeadPerToken:
    """Applies a head that is a plain layer to patch tokens [B, T, D]; `features` computes the tokens of images."""

    method = "the class head on every patch token"

    def __init__(self, features: Callable[[Tensor], Tensor], head: nn.Module) -> None:
        self.features, self.head = features, head

    def __call__(self, images: Tensor) -> Tensor:
        """Computes logits [B, C, H, W] of images [B, 3, S, S]."""
        tokens = self.features(images)
        _, grid = token_grid(tokens.shape[1], 0, None)
        return self.head(tokens).unflatten(1, grid).permute(0, 3, 1, 2)


class TrainedTokenHead(HeadPerToken):
    """For networks that were trained with token labeling: their auxiliary head was trained on patch tokens."""

    method = "the auxiliary head on every patch token"


def token_grid(count: int, prefix: int | None, patch_grid: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
    """Returns P and H, W of `count` = P + T tokens; an undeclared prefix is the one that leaves a grid."""
    for skipped in (0, 1, 2) if prefix is None else (prefix,):
        rest = count - skipped
        if patch_grid is not None and math.prod(patch_grid) == rest:
            return skipped, (patch_grid[0], patch_grid[1])
        side = math.isqrt(max(rest, 0))
        if side > 1 and side * side == rest:
            return skipped, (side, side)
    got = f"{count} tokens" + (f" with {prefix} in front of them" if prefix else "")
    raise TeacherError(
        "the teacher's tokens do not form a grid", got=got, expected="a token per patch", remedy=GIVE_SCORE_MAPS
    )
