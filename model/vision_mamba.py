"""Vision Mamba as a backbone with timm's interface; `vim` and `demansia` name its sizes.

Legend: B images; h×w token grid, T = h·w tokens; L = T + 1 sequence length; D model width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from timm.layers import DropPath, lecun_normal_, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.errors import ModelError
from model.mixer import BidirectionalMamba
from model.patch_embed import ConvStem, PatchProjection
from model.patch_model import PatchModel
from model.token_heads import TokenBox, without_token

NORM_EPS = 1e-5


class Block(nn.Module):
    """(hidden, residual) -> (mixer output, residual); what the mixer gives is added by the next block."""

    def __init__(self, dim: int, drop_path: float, **mixer: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.mixer = BidirectionalMamba(dim, **mixer)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = add_residual(hidden, residual, self.drop_path)
        return self.mixer(self.norm(residual.to(self.norm.weight.dtype))), residual


def add_residual(hidden: torch.Tensor, residual: torch.Tensor | None, drop_path: nn.Module) -> torch.Tensor:
    """residual + drop_path(hidden), in float32 at least."""
    if residual is None:
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return residual + drop_path(hidden)


class VisionMamba(PatchModel):
    """Patch tokens with a class token in their middle, through bidirectional Mamba mixers.

    img_size        side, or (height, width), in pixels; other sizes are refused (see `set_input_size`)
    stem            "conv": LV-ViT's, "patch": one projection
    aux_head        an auxiliary head on every token
    cls_place       "middle" or "start" of the sequence
    drop_path_rate  rises linearly to this; layer i's rate acts on what layer i − 1 gave
    d_state, d_conv, expand, bidirectional, halve, layer_scale, backend  see `BidirectionalMamba`
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        stem: str = "conv",
        aux_head: bool = True,
        cls_place: str = "middle",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
        **mixer: Any,
    ) -> None:
        super().__init__()
        self.num_classes, self.embed_dim, self.num_features = num_classes, embed_dim, embed_dim
        self.head_hidden_size, self.in_chans, self.cls_place = embed_dim, in_chans, cls_place
        self.num_prefix_tokens = 0  # the class token is in the middle: `without_token` takes it out
        self.grad_checkpointing = False
        stems = {"conv": ConvStem, "patch": PatchProjection}
        if stem not in stems or cls_place not in ("middle", "start") or global_pool not in ("token", ""):
            raise ModelError(
                f"unknown setting: got stem={stem!r}, cls_place={cls_place!r}, global_pool={global_pool!r}, "
                'expected stem "conv" or "patch", cls_place "middle" or "start", global_pool "token"'
            )
        self.patch_embed = stems[stem](in_chans, embed_dim, patch_size)
        self.img_size = to_2tuple(img_size)
        self.grid = self._grid_for(self.img_size)
        tokens = math.prod(self.grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [0.0, *(drop_path_rate * i / max(1, depth - 1) for i in range(depth))]
        self.layers = nn.ModuleList([Block(embed_dim, rate, **mixer) for rate in rates[:-1]])
        self.drop_path = DropPath(rates[-1])
        self.norm_f: nn.Module = nn.RMSNorm(embed_dim, eps=NORM_EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.aux_head = (nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()) if aux_head else None
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"layers.{i}"} for i in range(depth)
        ]
        self._init_weights()

    def _init_weights(self) -> None:
        for place in (self.cls_token, self.pos_embed):
            trunc_normal_(place, std=0.02)
        for module in self.patch_embed.modules():
            if isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for head in (self.head, self.aux_head):
            if isinstance(head, nn.Linear):
                trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)
        for layer in cast(list[Block], self.layers):
            # As in GPT-2: the sum over all layers starts with the variance of one.
            layer.mixer.out_proj.weight.data.div_(math.sqrt(len(self.layers)))

    def cls_position(self, length: int) -> int:
        return (length - 1) // 2 if self.cls_place == "middle" else 0

    def _run(self, layer: nn.Module, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple:
        if self.grad_checkpointing and not torch.jit.is_scripting() and torch.is_grad_enabled():
            return checkpoint(layer, hidden, residual, use_reentrant=False)
        return layer(hidden, residual)

    def _finish(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        total = add_residual(hidden, residual, self.drop_path)
        return self.norm_f(total.to(self.pos_embed.dtype))

    def forward_features(self, images: torch.Tensor, mix: TokenBox | None = None) -> torch.Tensor:
        """Normalised features of all tokens, the class token in its place: [B, L, D]."""
        hidden, residual = self.embed(images, mix), None
        for layer in self.layers:
            hidden, residual = self._run(layer, hidden, residual)
        return self._finish(hidden, residual)

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
        """timm's: features after the layers of `indices`, as maps [B, D, h, w] ("NCHW") or tokens [B, T, D] ("NLC")."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ModelError(f'output_fmt is not known: got {output_fmt!r}, expected "NCHW" or "NLC"')
        wanted, last = feature_take_indices(len(self.layers), indices)
        grid, found = self.grid_of(x), []
        hidden, residual = self.embed(x), None
        for i, layer in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            hidden, residual = self._run(layer, hidden, residual)
            if i in wanted:
                total = self._finish(hidden, residual) if norm else residual + hidden
                place = self.cls_position(total.shape[1])
                tokens = without_token(total, place)
                tokens = tokens.mT.unflatten(2, grid) if output_fmt == "NCHW" else tokens
                found.append((tokens, total[:, place : place + 1]) if return_prefix_tokens else tokens)
        return found if intermediates_only else (self._finish(hidden, residual), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drop the layers that `indices` do not need."""
        wanted, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters whose decay would hurt: states, skips, positions; timm adds norms and biases."""
        marked = ("A_log", "A_b_log", "D", "D_b")
        states = {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in marked}
        return states | {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }
