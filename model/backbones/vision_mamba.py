"""Vision Mamba as a backbone with timm's interface; `vim` and `demansia` beside it register its sizes.

Legend: B images; h×w token grid, T = h·w tokens; L = T + 1 sequence length; D model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.fx
from timm.layers import DropPath, lecun_normal_, to_2tuple, trunc_normal_
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.patch_embed import ConvStem, PatchProjection
from model.backbones.patch_model import PatchModel, check_pool, drop_path_rates
from model.mixers import Mixer, create_mixer
from model.mixers.parts import widen

NORM_EPS = 1e-5


torch.fx.wrap("widen")


class SumNorm(nn.RMSNorm):
    """RMSNorm of the residual stream, computed in the dtype of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D] in the weights' dtype."""
        return super().forward(x.to(self.weight.dtype))


class Block(nn.Module):
    """x + mixer(norm(x)), with the sum in at least float32.

    Args:
        dim: model width D.
        drop_path: rate of stochastic depth.
        mixer: name of a registered mixer.
        options: passed to the mixer.
    """

    def __init__(self, dim: int, drop_path: float, mixer: str = "mamba", **options: Any) -> None:
        super().__init__()
        self.norm = SumNorm(dim, eps=NORM_EPS)
        self.mixer = create_mixer(mixer, dim, **options)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        return widen(x) + self.drop_path(self.mixer(self.norm(x)))


class VisionMamba(PatchModel):
    """Layers of a norm and a mixer, by default bidirectional Mamba, on patch tokens and a class token.

    Args:
        img_size: side, or (height, width), in pixels; other sizes are refused (see `set_input_size`).
        patch_size: side of a patch in pixels.
        in_chans: channels of the images.
        num_classes: classes of the class head; 0: no heads.
        embed_dim: model width D.
        depth: number of layers.
        stem: "conv" for LV-ViT's convolutional stem, "patch" for one linear projection.
        stem_width: channels of the convolutional stem.
        aux_head: add an auxiliary head on the patch tokens.
        cls_place: position of the class token: "middle" or "start" of the sequence.
        drop_rate: dropout on the embedded tokens.
        drop_path_rate: rate of stochastic depth in the last layer; the rates rise linearly from 0 in the first.
        global_pool: input of the class head, see `TokenLabelHeads`.
        d_state: state size N; this and the arguments down to `backend` are passed to the mixer, if it is not None: the
            mixer's own choice.
        d_conv: taps of the causal convolution.
        expand: E / D.
        dt_rank: rank of the step size.
        directions: "both", or "forward" alone.
        halve: average the two directions instead of adding them.
        layer_scale: initial factor of each output channel.
        backend: backend of the scan, see `model.ops.selective_scan`.
        mixer: name of the mixer, see `create_mixer`.
        mixer_options: further options of the mixer; None: none.
        layer_mixers: layers with another mixer: the layer's number -> the mixer's name and options; None: none.
        aux_classes: classes of the auxiliary head, if they are others, as those of a teacher are; None: the same
            classes.

    Raises:
        ModelError: an unknown stem, cls_place, global_pool, mixer or option of it, a layer that does not exist, or an
            img_size that does not divide into patches.
    """

    BLOCKS, NORM = "layers", "norm_f"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        stem: str = "conv",
        stem_width: int = 64,
        aux_head: bool = True,
        cls_place: str = "middle",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
        d_state: int | None = None,
        d_conv: int | None = None,
        expand: int | None = None,
        dt_rank: int | None = None,
        directions: str | None = None,
        halve: bool | None = None,
        layer_scale: float | None = None,
        backend: str | None = None,
        mixer: str = "mamba",
        mixer_options: Mapping[str, Any] | None = None,
        layer_mixers: Mapping[int, tuple[str, Mapping[str, Any]]] | None = None,
        aux_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.aux_classes = num_classes, aux_classes
        self.embed_dim = self.num_features = embed_dim
        self.head_hidden_size, self.in_chans, self.cls_place = embed_dim, in_chans, cls_place
        self.num_prefix_tokens = 0  # the class token is in the middle; `without_token` removes it
        self.grad_checkpointing = False
        stems: dict[str, Any] = {"conv": partial(ConvStem, hidden=stem_width), "patch": PatchProjection}
        if stem not in stems or cls_place not in ("middle", "start"):
            raise ModelError(
                f"unknown setting: got stem={stem!r}, cls_place={cls_place!r}, "
                'expected stem "conv" or "patch", cls_place "middle" or "start"'
            )
        self.global_pool = check_pool(global_pool)
        self.patch_embed = stems[stem](in_chans, embed_dim, patch_size)
        self.img_size = to_2tuple(img_size)
        self.grid = self._grid_for(self.img_size)
        tokens = math.prod(self.grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        options: dict[str, Any] = {
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "dt_rank": dt_rank,
            "directions": directions,
            "halve": halve,
            "layer_scale": layer_scale,
            "backend": backend,
        }
        given = {key: value for key, value in options.items() if value is not None}
        mixers = _mixers((mixer, {**given, **(mixer_options or {})}), layer_mixers or {}, depth)
        rates = drop_path_rates(drop_path_rate, depth)
        self.layers = nn.ModuleList(
            [Block(embed_dim, rate, name, **own) for rate, (name, own) in zip(rates, mixers, strict=True)]
        )
        self.norm_f: nn.Module = SumNorm(embed_dim, eps=NORM_EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        tokens_out = self.aux_outputs()
        self.aux_head = (nn.Linear(embed_dim, tokens_out) if tokens_out else nn.Identity()) if aux_head else None
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"layers.{i}"} for i in range(depth)
        ]
        self._init_weights()

    def _init_weights(self) -> None:
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
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
            # As in GPT-2: at the start the sum over all layers has the variance of one layer.
            layer.mixer.out_proj.weight.data.div_(math.sqrt(len(self.layers)))

    def cls_position(self, length: int) -> int:
        """Index of the class token in a sequence of `length` tokens."""
        return (length - 1) // 2 if self.cls_place == "middle" else 0

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay; timm adds norms and biases."""
        names = {"pos_embed", "cls_token"}
        for path, module in self.named_modules():
            if isinstance(module, Mixer):
                names |= {f"{path}.{name}" for name in module.no_weight_decay()}
        return names

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }


def _mixers(
    usual: tuple[str, Mapping[str, Any]], others: Mapping[int, tuple[str, Mapping[str, Any]]], depth: int
) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and options of each layer's mixer. Raises ModelError if one of the others is for a layer beyond `depth`."""
    if beyond := [layer for layer in others if not 0 <= layer < depth]:
        raise ModelError(
            "a mixer for a layer that does not exist", got=f"layer {beyond[0]}", expected=f"0 to {depth - 1}"
        )
    return [others.get(layer, usual) for layer in range(depth)]
