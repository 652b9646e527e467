"""What token-labeled models have in common: token mixing, position embedding, a class head and a head on tokens.

Legend: B images; C classes; h×w token grid, T = h·w tokens; L = T + 1 sequence length; D model width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import ModelError

Logits = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class TokenBox(Protocol):
    """Tokens y0 ≤ y < y1, x0 ≤ x < x1 of the grid, which show the partner: image B−1−b for image b."""

    @property
    def y0(self) -> int: ...
    @property
    def x0(self) -> int: ...
    @property
    def y1(self) -> int: ...
    @property
    def x1(self) -> int: ...


# A mask, bool [h, w], says the same as a box. Compilers make one graph for all masks, but many for the sides of a box.
Mix = TokenBox | torch.Tensor


def mix_mask(mix: Mix, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """bool [h, w]: the tokens of the grid that show the partner. Raises ModelError where `mix` does not fit it."""
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
        raise ModelError(f"the mix box {mix} leaves the grid of {height}×{width} tokens; draw it for this grid")
    inside = torch.zeros(height, width, dtype=torch.bool, device=device)
    inside[mix.y0 : mix.y1, mix.x0 : mix.x1] = True
    return inside


def mix_tokens(tokens: torch.Tensor, mix: Mix | None) -> torch.Tensor:
    """Tokens [B, D, h, w] with each image's partner where it is mixed; the given tensor is left as it is."""
    if mix is None:
        return tokens
    grid = (tokens.shape[-2], tokens.shape[-1])
    return torch.where(mix_mask(mix, grid, tokens.device), tokens.flip(0), tokens)


def insert_token(tokens: torch.Tensor, token: torch.Tensor, position: int) -> torch.Tensor:
    """Tokens [B, T, D] and one token [1, 1, D] to [B, T + 1, D], with it at `position`."""
    return torch.cat([tokens[:, :position], token.expand(tokens.shape[0], -1, -1), tokens[:, position:]], 1)


def without_token(sequence: torch.Tensor, position: int) -> torch.Tensor:
    """[B, L, D] -> [B, L − 1, D] without the token at `position`."""
    return torch.cat([sequence[:, :position], sequence[:, position + 1 :]], 1)


def resize_position_embedding(
    embedding: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], old_place: int, new_place: int
) -> torch.Tensor:
    """[1, L, D] of one grid to another, bicubic; the class token's entry moves from `old_place` to `new_place`."""
    if old_grid == new_grid and old_place == new_place:
        return embedding
    cls, grid = embedding[:, old_place : old_place + 1], without_token(embedding, old_place)
    planes = grid.mT.reshape(1, -1, *old_grid)
    if old_grid != new_grid:
        resized = F.interpolate(planes.float(), new_grid, mode="bicubic", antialias=True, align_corners=False)
        planes = resized.to(embedding.dtype)
    return insert_token(planes.flatten(2).mT, cls, new_place)


class TokenLabelHeads(nn.Module):
    """A class head on one token and an auxiliary head on all others.

    Subclasses set `head` and `aux_head` (Linear, or Identity where num_classes is 0; aux_head may be None), and give
    `forward_features(images, mix)` -> [B, L, D] and `cls_position(length)`.

    aux_weight   in evaluation, how much each class's largest auxiliary logit over the tokens adds to its class logit
    global_pool  what the class head reads: "token" the class token, "avg" the mean of the others, "" every token
    """

    head: nn.Module
    aux_head: nn.Module | None
    aux_weight = 0.5
    num_classes: int
    global_pool: str

    def cls_position(self, length: int) -> int:
        raise NotImplementedError

    def forward_features(self, images: torch.Tensor, mix: Mix | None = None) -> torch.Tensor:
        raise NotImplementedError

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """What the class head reads of features [B, L, D]: [B, D], or all of it where `global_pool` is ""."""
        place = self.cls_position(features.shape[1])
        if self.global_pool == "token":
            return features[:, place]
        return without_token(features, place).mean(1) if self.global_pool == "avg" else features

    def token_logits(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Class logits [B, C] and auxiliary logits [B, T, C] (None without an auxiliary head) of features [B, L, D]."""
        cls = self.head(self.pool(features))
        if self.aux_head is None:
            return cls, None
        return cls, self.aux_head(without_token(features, self.cls_position(features.shape[1])))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> Logits:
        """[B, L, D] -> in training (class logits, auxiliary logits), in evaluation one [B, C].

        pre_logits  the pooled features [B, D] instead
        """
        if pre_logits:
            return self.pool(features)
        cls, aux = self.token_logits(features)
        if aux is None or not self.num_classes or not self.global_pool:
            return cls
        if self.training:
            return cls, aux
        return cls + self.aux_weight * aux.amax(1) if self.aux_weight else cls

    def forward(self, images: torch.Tensor, mix: Mix | None = None) -> Logits:
        """Images [B, in_chans, height, width]; `mix`: the box or mask [h, w] of tokens that a batch's images swap."""
        return self.forward_head(self.forward_features(images, mix))

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Auxiliary logits as a map [B, C, h, w]: a trained model is a teacher of its own."""
        features = self.forward_features(images)
        _, aux = self.token_logits(features)
        if aux is None or not self.num_classes:
            raise ModelError(
                "this model has no auxiliary head, so no scores of its tokens; build it with aux_head=True"
            )
        return aux.mT.unflatten(2, self.grid_of(images))

    def grid_of(self, images: torch.Tensor) -> tuple[int, int]:
        """h, w of the token grid of images [B, in_chans, height, width]. Raises ModelError where they do not fit."""
        raise NotImplementedError
