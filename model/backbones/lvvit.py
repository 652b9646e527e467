"""LV-ViT: a plain vision transformer with a convolutional stem, trained with token labels.

Jiang et al., "All Tokens Matter" (2021). The sizes below are registered with timm.

Legend: B images; h×w token grid, T = h·w tokens; L = T + 1 sequence length; D model width.

| name | width | blocks | heads | residual branches ÷ | stem | parameters |
|---|---|---|---|---|---|---|
| lvvit_t | 240 | 12 | 4 | 1 | 64 | 8.5M |
| lvvit_s | 384 | 16 | 6 | 2 | 64 | 26.2M |
| lvvit_m | 512 | 20 | 8 | 2 | 64 | 55.8M |
| lvvit_l | 768 | 24 | 12 | 3 | 128 | 150.0M |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm import create_model
from timm.layers import Attention, DropPath, Mlp, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.patch_embed import ConvStem
from model.backbones.patch_model import PatchModel, check_pool, drop_path_rates
from model.backbones.published import PROJECTION, STEM, patch_arguments, registered_size
from model.backbones.timm_interface import build_patch_model, fit_position_embedding, untrained_cfg
from model.families import Family, PublishedWeights, State, register_family

NORM_EPS = 1e-5


class Block(nn.Module):
    """Attention and an MLP, each divided by `skip_lam` before it is added to the residual stream."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, skip_lam: float, drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias=False, proj_drop=drop)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=nn.GELU, drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.drop_path(self.attn(self.norm1(x))) / self.skip_lam
        return x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam


class LVViT(PatchModel):
    """Attention blocks on a class token and patch tokens.

    Args:
        img_size: side, or (height, width), in pixels; other sizes are refused (see `set_input_size`).
        patch_size: side of a patch in pixels; even.
        in_chans: channels of the images.
        num_classes: classes of the class head; 0: no heads.
        embed_dim: model width D.
        depth: number of blocks.
        num_heads: attention heads; they must divide D.
        mlp_ratio: hidden width of the MLP / D.
        skip_lam: divisor of each residual branch.
        stem_width: channels of the stem's convolutions.
        aux_head: add an auxiliary head on the patch tokens.
        drop_rate: dropout on the embedded tokens and in the blocks.
        drop_path_rate: rate of stochastic depth in the last block; the rates rise linearly from 0 in the first.
        global_pool: input of the class head, see `TokenLabelHeads`.
        aux_classes: classes of the auxiliary head, if they are others, as those of a teacher are; None: the same
            classes.

    Raises:
        ModelError: embed_dim is not a multiple of num_heads, an unknown global_pool, or an img_size that does not
            divide into patches.
    """

    BLOCKS, NORM = "blocks", "norm"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        skip_lam: float = 2.0,
        stem_width: int = 64,
        aux_head: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
        aux_classes: int | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ModelError(
                f"embed_dim is not a multiple of num_heads: got embed_dim={embed_dim}, num_heads={num_heads}"
            )
        self.global_pool = check_pool(global_pool)
        self.num_classes, self.embed_dim, self.num_features = num_classes, embed_dim, embed_dim
        self.head_hidden_size, self.in_chans, self.num_prefix_tokens = embed_dim, in_chans, 1
        self.grad_checkpointing = False
        self.patch_embed = ConvStem(in_chans, embed_dim, patch_size, stem_width)
        self.img_size = to_2tuple(img_size)
        self.grid = self._grid_for(self.img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid) + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, mlp_ratio, skip_lam, drop_rate, rate) for rate in rates]
        )
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.head: nn.Module = nn.Identity()
        self.aux_head: nn.Module | None = nn.Identity() if aux_head else None
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.reset_classifier(num_classes, aux_classes=aux_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialize all but the convolutions, which keep torch's initialization."""
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def cls_position(self, length: int) -> int:
        """Index of the class token: 0."""
        return 0

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay; timm adds norms and biases."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, for layer-wise learning rates."""
        stem = r"^cls_token|pos_embed|patch_embed"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


SIZES: dict[str, dict[str, Any]] = {
    "lvvit_t": {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0},
    "lvvit_s": {"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0},
    "lvvit_m": {"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0},
    "lvvit_l": {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_width": 128},
}
NAMES = tuple(SIZES)
default_cfgs = generate_default_cfgs({f"{name}.untrained": untrained_cfg() for name in NAMES})


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> LVViT:
    return build_patch_model(LVViT, variant, pretrained, **{**SIZES[variant], **kwargs})


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T, width 240 with 12 blocks; `kwargs` as for `LVViT`."""
    return _create("lvvit_t", pretrained, kwargs)


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S, width 384 with 16 blocks; `kwargs` as for `LVViT`."""
    return _create("lvvit_s", pretrained, kwargs)


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M, width 512 with 20 blocks; `kwargs` as for `LVViT`."""
    return _create("lvvit_m", pretrained, kwargs)


@register_model
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L, width 768 with 24 blocks; `kwargs` as for `LVViT`."""
    return _create("lvvit_l", pretrained, kwargs)


def _recognize(state: State) -> bool:
    return {"blocks.0.attn.qkv.weight", STEM, "pos_embed"} <= state.keys()


def _builder(weights: PublishedWeights) -> Callable[[], nn.Module]:
    arguments = patch_arguments(weights, 2 * weights.state[PROJECTION].shape[-1], "blocks")
    if name := registered_size(SIZES, arguments):
        return partial(create_model, name, **arguments)
    raise ModelError(
        f"{weights.file} has no known LV-ViT size, so its num_heads and skip_lam are unknown: got width "
        f"{arguments['embed_dim']}, {arguments['depth']} blocks, expected those of {', '.join(SIZES)}; pass model="
    )


register_family(
    Family(
        "LV-ViT",
        NAMES,
        _recognize,
        _builder,
        convert=fit_position_embedding,
        token_head={"aux_head": True},
        projections=("qkv", "proj"),
    )
)
