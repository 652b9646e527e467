"""Shared parts of token-labeled models: token mixing, position embeddings, a class head and an auxiliary token head.

Legend: B images; C classes; h×w token grid, T = h·w tokens; L = T + 1 sequence length; D model width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from labeler.base.errors import ModelError

Logits = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class TokenBox(Protocol):
    """A rectangle of tokens, y0 ≤ y < y1 and x0 ≤ x < x1, that is taken from the partner: image B−1−b for image b."""

    @property
    def y0(self) -> int: ...
    @property
    def x0(self) -> int: ...
    @property
    def y1(self) -> int: ...
    @property
    def x1(self) -> int: ...


# A mask, bool [h, w], can stand for a box. Compilers need one graph for all masks, but many for the sides of a box.
Mix = TokenBox | torch.Tensor


def mix_mask(mix: Mix, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Turn a mix box or mask into a mask of the tokens that are taken from the partner.

    Args:
        mix: a box on the grid, or a mask, bool [h, w].
        grid: h, w of the token grid.
        device: where the mask is needed.

    Returns:
        bool [h, w]: True where the token is the partner's.

    Raises:
        ModelError: `mix` does not fit the grid.
    """
    if isinstance(mix, torch.Tensor):
        if mix.shape != grid or mix.dtype != torch.bool:
            raise ModelError(
                "the mask of mixed tokens does not fit",
                got=f"{mix.dtype} {list(mix.shape)}",
                expected=f"torch.bool {list(grid)}",
            )
        return mix.to(device)
    height, width = grid
    if not (0 <= mix.y0 <= mix.y1 <= height and 0 <= mix.x0 <= mix.x1 <= width):
        raise ModelError(
            f"the mix box does not lie inside the grid: got {mix}, expected a box on {height}×{width} tokens"
        )
    inside = torch.zeros(height, width, dtype=torch.bool, device=device)
    inside[mix.y0 : mix.y1, mix.x0 : mix.x1] = True
    return inside


def mix_tokens(tokens: torch.Tensor, mix: Mix | None) -> torch.Tensor:
    """Replace the mixed tokens of each image by its partner's.

    Args:
        tokens: [B, D, h, w]; not modified.
        mix: box or mask of the mixed tokens; None: no mixing.

    Returns:
        The mixed tokens, [B, D, h, w].
    """
    if mix is None:
        return tokens
    grid = (tokens.shape[-2], tokens.shape[-1])
    return torch.where(mix_mask(mix, grid, tokens.device), tokens.flip(0), tokens)


def insert_token(tokens: torch.Tensor, token: torch.Tensor, position: int) -> torch.Tensor:
    """Insert `token` [1, 1, D] into `tokens` [B, T, D] at `position`. Returns [B, T + 1, D]."""
    return torch.cat([tokens[:, :position], token.expand(tokens.shape[0], -1, -1), tokens[:, position:]], 1)


def without_token(sequence: torch.Tensor, position: int) -> torch.Tensor:
    """Remove the token at `position` from `sequence` [B, L, D]. Returns [B, L − 1, D]."""
    return torch.cat([sequence[:, :position], sequence[:, position + 1 :]], 1)


def resize_position_embedding(
    embedding: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], old_index: int, new_index: int
) -> torch.Tensor:
    """Resize a position embedding to another grid (bicubic).

    Args:
        embedding: [1, L, D], the class token's entry included.
        old_grid: h, w of its grid.
        new_grid: h, w of the grid to resize it to.
        old_index: index of the class token's entry in `embedding`.
        new_index: index of the class token's entry in the result.

    Returns:
        [1, L, D] for the new grid.
    """
    if old_grid == new_grid and old_index == new_index:
        return embedding
    cls, grid = embedding[:, old_index : old_index + 1], without_token(embedding, old_index)
    return insert_token(resample_abs_pos_embed(grid, new_grid, old_grid, num_prefix_tokens=0), cls, new_index)


class TokenLabelHeads(nn.Module):
    """A class head on the class token and an auxiliary head on all other tokens.

    Subclasses set `head` and `aux_head` (Linear, or Identity where num_classes is 0; aux_head may be None), and define
    `forward_features(images, mix)` -> [B, L, D] and `cls_position(length)`.

    Attributes:
        head: the class head.
        aux_head: the auxiliary head; None: the model has none.
        aux_weight: weight of the auxiliary logits in evaluation: each class's largest one over the tokens is added to
            its class logit with this factor. Without effect if the heads have other classes.
        num_classes: number of classes of the class head; 0: no heads.
        aux_classes: number of classes of the auxiliary head, if they are other classes than those of the class head, as
            those of a teacher are; None: the same classes.
        global_pool: input of the class head: "token" for the class token, "avg" for the mean of the other tokens, ""
            for every token.
    """

    head: nn.Module
    aux_head: nn.Module | None
    aux_weight = 0.5
    num_classes: int
    aux_classes: int | None = None
    global_pool: str

    def cls_position(self, length: int) -> int:
        """Index of the class token in a sequence of `length` tokens."""
        raise NotImplementedError

    def forward_features(self, images: torch.Tensor, mix: Mix | None = None) -> torch.Tensor:
        """Features [B, L, D] of images [B, in_chans, height, width]; `mix`: the tokens that the images swap."""
        raise NotImplementedError

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Pool features [B, L, D] for the class head: [B, D], or all of them where `global_pool` is ""."""
        index = self.cls_position(features.shape[1])
        if self.global_pool == "token":
            return features[:, index]
        return without_token(features, index).mean(1) if self.global_pool == "avg" else features

    def token_logits(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply both heads to features [B, L, D].

        Returns:
            Class logits [B, C] and auxiliary logits [B, T, C]; None for the latter without an auxiliary head.
        """
        cls = self.head(self.pool(features))
        if self.aux_head is None:
            return cls, None
        return cls, self.aux_head(without_token(features, self.cls_position(features.shape[1])))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> Logits:
        """Apply the heads to features [B, L, D].

        Args:
            features: what `forward_features` returned.
            pre_logits: return the pooled features [B, D] instead of logits.

        Returns:
            In training (class logits [B, C], auxiliary logits [B, T, C]); in evaluation one tensor [B, C].
        """
        if pre_logits:
            return self.pool(features)
        cls, aux = self.token_logits(features)
        if aux is None or not self.num_classes or not self.global_pool:
            return cls
        if self.training:
            return cls, aux
        return self.combined(cls, aux)

    def combined(self, cls: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
        """The output in evaluation [B, C] of class logits [B, C] and auxiliary logits [B, T, C]."""
        return cls + self.aux_weight * aux.amax(1) if self.aux_weight and self.aux_classes is None else cls

    def aux_outputs(self) -> int:
        """Number of auxiliary logits per token; 0: no heads."""
        return self.aux_classes if self.num_classes and self.aux_classes is not None else self.num_classes

    def forward(self, images: torch.Tensor, mix: Mix | None = None) -> Logits:
        """Run the model.

        Args:
            images: [B, in_chans, height, width].
            mix: box or mask [h, w] of the tokens that the images of the batch swap; None: no mixing.

        Returns:
            In training (class logits [B, C], auxiliary logits [B, T, C]); in evaluation one tensor [B, C].
        """
        return self.forward_head(self.forward_features(images, mix))

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Auxiliary logits as a map, so that a trained model can be a teacher.

        Args:
            images: [B, in_chans, height, width].

        Returns:
            [B, C, h, w].

        Raises:
            ModelError: the model has no auxiliary head.
        """
        features = self.forward_features(images)
        _, aux = self.token_logits(features)
        if aux is None or not self.num_classes:
            raise ModelError(
                "this model has no auxiliary head, and so no scores of its tokens; build it with aux_head=True"
            )
        return aux.mT.unflatten(2, self.grid_of(images))

    def grid_of(self, images: torch.Tensor) -> tuple[int, int]:
        """h, w of the token grid for images [B, in_chans, height, width]. Raises ModelError if they do not fit."""
        raise NotImplementedError
