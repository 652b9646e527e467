"""ViTDet's simple feature pyramid: maps of strides 4, 8, 16 and 32 from a backbone whose tokens have a single stride.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (2022). `register_pyramids` registers a
pyramid with timm for each plain backbone: `timm.create_model("demansia_tiny_sfp", features_only=True)`.

Legend: B images; D model width; h×w token grid, T = h·w tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models._features import feature_take_indices
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.patch_model import PatchModel

STRIDES = (4, 8, 16, 32)
WIDEST = 256  # channels of the maps, as in ViTDet; fewer where the backbone is narrower
SUFFIX = "_sfp"


class FeaturePyramid(nn.Module):
    """A plain backbone with a simple feature pyramid. It takes images whose sides are multiples of the patch's.

    The tokens of the last layer, or of four layers, become maps of four strides: transposed convolutions double the
    resolution, pooling halves it. A 1×1 and a 3×3 convolution follow. Called with images, it returns the four maps.

    Args:
        plain: the registered name of a plain backbone.
        channels: of each map; None: 256, or D for a narrower backbone.
        layers: four layers of the backbone, counted from 0, one for each stride: the map is made from the residual
            stream after that layer. None: all maps are made from the backbone's output.
        output_stride: the coarsest stride, 8, 16 or 32; coarser maps stay at it.
        backbone_args: for the backbone, where a library takes such a name for its own: {"depth": 12}. None: no more.
        kwargs: for the backbone. Those of heads are ignored, as it gets none.

    Attributes:
        backbone: the plain backbone, without heads.
        feature_info: timm's description of the maps.
        out_channels: channels of each map.

    Raises:
        ModelError: the backbone is not plain, or the arguments do not fit it.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        plain: str,
        channels: int | None = None,
        layers: Sequence[int] | None = None,
        output_stride: int = 32,
        backbone_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        kwargs |= backbone_args or {}
        for heads in ("num_classes", "global_pool", "aux_head", "aux_classes"):
            kwargs.pop(heads, None)
        backbone = timm.create_model(plain, num_classes=0, **kwargs)
        if not isinstance(backbone, PatchModel):
            raise ModelError("a feature pyramid is for backbones on patches", got=plain)
        if output_stride not in STRIDES[1:]:
            raise ModelError("output_stride does not fit", got=output_stride, expected="8, 16 or 32")
        backbone.dynamic_img_size = True
        backbone.aux_head = None
        self.layers = _checked(layers, len(getattr(backbone, backbone.BLOCKS)))
        if self.layers is not None:
            backbone.prune_intermediate_layers(list(self.layers), prune_norm=True, prune_head=True)
        self.backbone, self.num_classes, self.in_chans = backbone, 0, backbone.in_chans
        width = backbone.embed_dim
        self.out_channels = self.num_features = channels or min(WIDEST, width)
        strides = [min(stride, output_stride) for stride in STRIDES]
        patch = backbone.patch_embed.patch_size
        self.levels = nn.ModuleList([_level(width, self.out_channels, patch, stride) for stride in strides])
        self.feature_info = [
            {"num_chs": self.out_channels, "reduction": stride, "module": f"levels.{i}"}
            for i, stride in enumerate(strides)
        ]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images [B, in_chans, height, width] to four maps, the finest first."""
        return self.forward_intermediates(images, intermediates_only=True)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """The coarsest map."""
        return self.forward(images)[-1]

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Chosen maps, with timm's interface.

        Args:
            x: images [B, in_chans, height, width].
            indices: the maps, or how many of the last ones; None: all.
            norm: without effect: every map ends with a norm.
            stop_early: without effect: all maps come from the same layers.
            output_fmt: "NCHW".
            intermediates_only: return only the list of maps.

        Returns:
            (the coarsest map, list of maps), or the list alone.

        Raises:
            ModelError: another `output_fmt`, or images that do not fit.
        """
        if output_fmt != "NCHW":
            raise ModelError("unknown output_fmt", got=repr(output_fmt), expected='"NCHW"')
        wanted, _ = feature_take_indices(len(self.levels), indices)
        tokens = self._tokens(x)
        maps = [self.levels[i](tokens[i]) for i in wanted]
        return maps if intermediates_only else (maps[-1], maps)

    def _tokens(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The backbone's tokens for each map, [B, D, h, w]."""
        if self.layers is None:
            last = len(getattr(self.backbone, self.backbone.BLOCKS)) - 1
            output = self.backbone.forward_intermediates(images, [last], norm=True, intermediates_only=True)
            return output * len(self.levels)
        chosen = sorted(set(self.layers))
        found = self.backbone.forward_intermediates(images, chosen, intermediates_only=True)
        return [found[chosen.index(layer)] for layer in self.layers]

    def get_classifier(self) -> nn.Module:
        """Identity: there is no class head."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Does nothing for 0 classes. Raises ModelError for others: a pyramid has no class head."""
        if num_classes:
            raise ModelError("a feature pyramid has no class head", got=f"{num_classes} classes", expected="0")

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the position embedding for good; other sizes stay possible, with a resized copy at each call."""
        self.backbone.set_input_size(img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay; timm adds norms and biases."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}  # type: ignore[operator]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters: those of the backbone, then the pyramid with what comes after it."""
        return below("backbone.", self.backbone.group_matcher(coarse))  # type: ignore[operator]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of the blocks on or off."""
        self.backbone.set_grad_checkpointing(enable)


def below(prefix: str, groups: dict[str, Any]) -> dict[str, Any]:
    """timm's groups of parameters of a module, as seen from the module that has it under `prefix`."""

    def under(pattern: str) -> str:
        return f"^{re.escape(prefix)}(?:{pattern.removeprefix('^')})"

    return {
        name: under(spec) if isinstance(spec, str) else [(under(pattern), suffix) for pattern, suffix in spec]
        for name, spec in groups.items()
    }


def _checked(layers: Sequence[int] | None, depth: int) -> tuple[int, ...] | None:
    """The layers, counted from 0. Raises ModelError unless they are one for each map and exist."""
    if layers is None:
        return None
    if len(layers) != len(STRIDES) or not all(type(layer) is int and 0 <= layer < depth for layer in layers):
        raise ModelError(
            "layers do not fit", got=list(layers), expected=f"{len(STRIDES)} numbers from 0 to {depth - 1}"
        )
    return tuple(layers)


def _level(width: int, channels: int, patch: int, stride: int) -> nn.Sequential:
    """Tokens [B, D, h, w] of `patch` pixels to a map of `stride`."""
    steps = math.log2(patch / stride)
    if steps != int(steps):
        raise ModelError("a pyramid needs patches whose side is a power of two", got=f"patch_size={patch}")
    parts: list[nn.Module] = [nn.MaxPool2d(stride // patch)] if steps < 0 else []
    for step in range(int(steps)):
        parts += [LayerNorm2d(width), nn.GELU()] if step else []
        parts.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    parts += [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)]
    parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*parts)


def register_pyramids(names: Iterable[str]) -> tuple[str, ...]:
    """Register a pyramid with timm for each plain backbone.

    Args:
        names: registered names of the backbones.

    Returns:
        The names of the pyramids: those of the backbones, followed by "_sfp".
    """
    return tuple(map(_register, names))


def _register(plain: str) -> str:
    name = plain + SUFFIX

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        how = {"out_indices": tuple(range(len(STRIDES))), "feature_cls": "getter"}
        return build_model_with_cfg(FeaturePyramid, name, pretrained, feature_cfg=how, plain=plain, **kwargs)

    create.__name__, create.__doc__ = name, f"A feature pyramid on `{plain}`; `kwargs` as for `FeaturePyramid`."
    usual = get_pretrained_cfg(plain).to_dict()
    kept = {key: usual[key] for key in ("url", "input_size", "interpolation", "crop_pct", "mean", "std", "license")}
    first = f"backbone.{usual['first_conv']}"
    default_cfgs.update(generate_default_cfgs({f"{name}.untrained": kept | {"first_conv": first, "classifier": None}}))
    register_model(create)
    return name


default_cfgs: dict[str, Any] = {}
