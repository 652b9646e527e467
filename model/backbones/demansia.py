"""DeMansia: Vision Mamba with LV-ViT's stem and token labels. The sizes below are registered with timm.

| name | width | layers | image | parameters |
|---|---|---|---|---|
| demansia_nano | 128 | 12 | 224² | ours |
| demansia_tiny | 192 | 24 | 224² | 8.06M, as published |
| demansia_small | 384 | 24 | 384² | 27.7M, as published |
| demansia_base | 768 | 24 | 224² | ours |
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from model.backbones.patch_model import build_patch_model, untrained_cfg
from model.backbones.vision_mamba import VisionMamba


class DeMansia(VisionMamba):
    """DeMansia: `VisionMamba` with a convolutional stem, the class token in the middle and an auxiliary head."""


NAMES = ("demansia_nano", "demansia_tiny", "demansia_small", "demansia_base")
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": untrained_cfg(384 if name == "demansia_small" else 224) for name in NAMES}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DeMansia:
    return build_patch_model(DeMansia, variant, pretrained, **kwargs)


@register_model
def demansia_nano(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 128 with 12 layers; `kwargs` as for `VisionMamba`."""
    return _create("demansia_nano", pretrained, **{"embed_dim": 128, "depth": 12, **kwargs})


@register_model
def demansia_tiny(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 192 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("demansia_tiny", pretrained, **{"embed_dim": 192, "depth": 24, **kwargs})


@register_model
def demansia_small(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 384 with 24 layers, for 384² pixels; `kwargs` as for `VisionMamba`."""
    return _create("demansia_small", pretrained, **{"img_size": 384, "embed_dim": 384, "depth": 24, **kwargs})


@register_model
def demansia_base(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 768 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("demansia_base", pretrained, **{"embed_dim": 768, "depth": 24, **kwargs})
