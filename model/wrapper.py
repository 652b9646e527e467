"""Token labeling around a timm backbone: an auxiliary head and token mixing.

Legend: B images; C classes; D width of the features; h×w token grid, T = h·w tokens; P prefix tokens.

The backbone keeps its own class head. The auxiliary head is one linear layer on the output of `forward_features`,
resampled to the token grid. Tokens are mixed in the output of `patch_embed`, before any position embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from timm.layers import PatchEmbed, to_2tuple, trunc_normal_
from torch import nn

from labeler.base.errors import ModelError
from model.feature_maps import ChangedOutput, Size, evaluation, grid_in, layout, resample, to_map, token_grid
from model.token_heads import Logits, Mix, TokenLabelHeads, mix_mask, mix_tokens


class TokenLabeled(TokenLabelHeads):
    """A backbone with an auxiliary head; made by `model.token_label`.

    The names of the backbone's parameters get the prefix `backbone.`.

    Attributes:
        grid: h, w of the auxiliary logits for images of `img_size`; it changes with the image size unless `grid` was
            given.
        mix_scale: rows and columns of `patch_embed`'s output per token; None: the backbone cannot mix tokens.
    """

    def __init__(
        self,
        backbone: nn.Module,
        grid: Any = None,
        img_size: Any = None,
        in_chans: int | None = None,
        aux_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self._embedded = ChangedOutput()  # of `patch_embed`
        self.name, self.num_classes = type(backbone).__name__, getattr(backbone, "num_classes", 0)
        if missing := [f for f in ("forward_features", "forward_head", "get_classifier") if not hasattr(backbone, f)]:
            raise ModelError(
                f"{self.name} is not a timm backbone: got no {', '.join(missing)}, expected timm's interface"
            )
        if not self.num_classes or isinstance(self.get_classifier(), nn.Identity):
            raise ModelError(f"{self.name} has no class head: got num_classes={self.num_classes}, expected 1 or more")
        self.pretrained_cfg = self.default_cfg = getattr(backbone, "pretrained_cfg", {})
        channels, *usual = self.pretrained_cfg.get("input_size", (3, 224, 224))
        self.in_chans = in_chans or getattr(backbone, "in_chans", None) or channels
        self.wanted_grid: Size | None = None if grid is None else to_2tuple(grid)
        self._fit(to_2tuple(img_size or getattr(self._patch_embed(), "img_size", None) or tuple(usual)))
        own = getattr(backbone, "aux_head", None)  # VOLO adds half its largest token score itself; we do that here
        if own is not None:
            backbone.aux_head = None  # type: ignore[assignment]
        self.aux_classes = aux_classes
        fits = isinstance(own, nn.Linear) and own.weight.shape == (self.aux_outputs(), self.num_features)
        self.aux_head: nn.Module = cast(nn.Module, own) if fits else self._new_head()
        self.training = backbone.training

    def _new_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        like = next(self.backbone.parameters())
        head = nn.Linear(self.num_features, self.aux_outputs(), device=like.device, dtype=like.dtype)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def _patch_embed(self) -> nn.Module | None:
        stem, embed = getattr(self.backbone, "stem", None), getattr(self.backbone, "patch_embed", None)
        return stem if isinstance(stem, PatchEmbed) else embed if isinstance(embed, nn.Module) else None

    def _fit(self, size: Size) -> None:
        """Run the backbone on a blank image to find the layout of its features and where tokens can be mixed."""
        like, patch_embed = next(self.backbone.parameters()), self._patch_embed()
        images = torch.zeros(1, self.in_chans, *size, device=like.device, dtype=like.dtype)
        embedded: list[torch.Tensor] = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            embedded.append(x)
            return x

        try:
            with evaluation(self.backbone), torch.no_grad(), self._embedded.by(patch_embed, keep):
                features = self.backbone.forward_features(images)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            got = f"{self.in_chans} channels of {size[0]}×{size[1]} pixels"
            raise ModelError(
                f"{self.name} does not run on {got} ({reason}); pass the img_size and in_chans that it was built for"
            ) from error
        self.num_prefix_tokens = 0
        if isinstance(features, torch.Tensor) and features.ndim == 3:
            known = getattr(self.backbone, "num_prefix_tokens", None)
            prefixes = (0, 1, 2) if known is None else (known,)
            self.num_prefix_tokens = next((p for p in prefixes if token_grid(features.shape[1] - p, size)), 0)
        maps = self.feature_map(features, size)
        if maps.shape[2:] == (1, 1):
            raise ModelError(
                f"{self.name} returns a single token for {size[0]}×{size[1]} pixels: pass a larger img_size, "
                "or choose another backbone if this one returns only its class token"
            )
        self.img_size, self.num_features = size, maps.shape[1]
        self.grid = self.wanted_grid or (maps.shape[2], maps.shape[3])
        self.mix_scale: Size | None = None
        cells = grid_in(embedded[0], layout(embedded[0], patch_embed, size), size) if embedded else None
        if cells and cells[0] % self.grid[0] == 0 == cells[1] % self.grid[1]:
            self.mix_scale = (cells[0] // self.grid[0], cells[1] // self.grid[1])

    def feature_map(self, features: torch.Tensor, size: Size) -> torch.Tensor:
        """Bring the backbone's features to one layout, without prefix tokens.

        Args:
            features: what `forward_features` returned.
            size: height, width of the images.

        Returns:
            [B, D, h, w] on the backbone's own grid.

        Raises:
            ModelError: the features are not a map that fits the image.
        """
        kind = layout(features, self.backbone, size)
        tokens = features[:, self.num_prefix_tokens :] if kind == "tokens" else features
        if kind is None or grid_in(tokens, kind, size) is None:
            got = f"a tensor {list(features.shape)}" if isinstance(features, torch.Tensor) else type(features).__name__
            raise ModelError(
                f"{self.name} returns no feature map that fits the image: for {size[0]}×{size[1]} pixels "
                f"forward_features gave {got}, expected [B, D, h, w], [B, h, w, D] or [B, P + T, D]; "
                "choose another backbone"
            )
        return to_map(tokens, kind, size)

    def token_logits(self, features: torch.Tensor, size: Size | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply both heads.

        Args:
            features: what `forward_features` returned.
            size: height, width of the images; None: `img_size`.

        Returns:
            Class logits [B, C] and auxiliary logits [B, T, C].

        Raises:
            ModelError: the backbone's head returns several outputs.
        """
        cls = self.backbone.forward_head(features)
        if not isinstance(cls, torch.Tensor):
            raise ModelError(
                f"{self.name}'s head returns several outputs: got {len(cls)}, expected one; "
                "turn off its distilled training"
            )
        maps = resample(self.feature_map(features, size or self.img_size), self.wanted_grid)
        return cls, self.aux_head(maps.flatten(2).mT)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False, size: Size | None = None) -> Logits:
        """As in `TokenLabelHeads`; `size`: height, width of the images, None: `img_size`."""
        if pre_logits or not self.num_classes:
            return self.backbone.forward_head(features, pre_logits=True)
        cls, aux = self.token_logits(features, size)
        return (cls, aux) if self.training else self.combined(cls, aux)

    def forward(self, images: torch.Tensor, mix: Mix | None = None) -> Logits:
        """As in `TokenLabelHeads`; `mix`: box or mask on `grid`."""
        return self.forward_head(self.forward_features(images, mix), size=(images.shape[-2], images.shape[-1]))

    def forward_features(self, images: torch.Tensor, mix: Mix | None = None) -> torch.Tensor:
        """Run the backbone without its head.

        Args:
            images: [B, in_chans, height, width].
            mix: box or mask on `grid`: these tokens are swapped before position embeddings are added; None: no mixing.

        Returns:
            The features in the backbone's own layout.

        Raises:
            ModelError: `mix` was given, but the backbone cannot mix tokens on this grid.
        """
        patch_embed, size = self._patch_embed(), (images.shape[-2], images.shape[-1])
        if mix is None:
            return self.backbone.forward_features(images)
        if self.mix_scale is None:
            raise ModelError(
                f"{self.name} cannot mix tokens of a {self.grid[0]}×{self.grid[1]} grid: "
                'got a mix box, expected None; mix patch-aligned pixels in the loader instead, with mix="image"'
            )
        down, across = self.mix_scale
        mask = mix_mask(mix, self.grid, images.device).repeat_interleave(down, 0).repeat_interleave(across, 1)

        def swapped(x: torch.Tensor) -> torch.Tensor:
            kind = layout(x, patch_embed, size)
            maps = mix_tokens(to_map(x, kind, size), mask)
            return maps.flatten(2).mT if kind == "tokens" else maps.permute(0, 2, 3, 1) if kind == "NHWC" else maps

        with self._embedded.by(patch_embed, swapped):
            return self.backbone.forward_features(images)

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Auxiliary logits as a map [B, C, h, w] of images [B, in_chans, height, width]."""
        size = (images.shape[-2], images.shape[-1])
        maps = resample(self.feature_map(self.forward_features(images), size), self.wanted_grid)
        return self.aux_head(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def set_input_size(self, img_size: int | Size) -> None:
        """Change the image size; `img_size`: side, or (height, width), in pixels."""
        if hasattr(self.backbone, "set_input_size"):
            self.backbone.set_input_size(img_size=to_2tuple(img_size))
        self._fit(to_2tuple(img_size))

    def get_classifier(self) -> Any:
        """The backbone's class head; some backbones have several."""
        return self.backbone.get_classifier()

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, aux_classes: int | None = None
    ) -> None:
        """Replace the class and auxiliary heads.

        Args:
            num_classes: classes of the class head; 0: remove both heads.
            global_pool: as in timm; None: unchanged.
            aux_classes: classes of the auxiliary head; None: those of the class head.
        """
        self.backbone.reset_classifier(num_classes, **({} if global_pool is None else {"global_pool": global_pool}))
        self.num_classes = num_classes
        self.reset_aux_head(aux_classes)

    def reset_aux_head(self, aux_classes: int | None = None) -> None:
        """Replace the auxiliary head alone; `aux_classes`: its classes, None: those of the class head."""
        self.aux_classes = aux_classes
        self.aux_head = self._new_head()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn the backbone's activation checkpointing on or off."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay."""
        marked: Iterable[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in marked}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The backbone's parameter groups, with `backbone.` in front of each name.

        timm matches patterns from the start of a name, with or without `^`.
        """
        groups = self.backbone.group_matcher(coarse=coarse)
        if callable(groups):
            return lambda name: groups(name.removeprefix("backbone."))

        def inside(pattern: Any) -> Any:
            if isinstance(pattern, str):
                return r"backbone\.(?:" + re.sub(r"(?<!\[)\^", "", pattern) + ")"
            return pattern and [(inside(part), suffix) for part, suffix in pattern]

        return {group: inside(pattern) for group, pattern in groups.items()}
