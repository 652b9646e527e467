"""Vision Mamba (Zhu et al., 2024): bidirectional Mamba on plain patches, class token in the middle."""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from model.backbones.patch_model import build_patch_model, untrained_cfg
from model.backbones.vision_mamba import VisionMamba


class Vim(VisionMamba):
    """Vim: `VisionMamba` with one linear projection per patch and no auxiliary head."""


NAMES = ("vim_tiny", "vim_small", "vim_base")
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": untrained_cfg(first_conv="patch_embed.proj", classifier="head") for name in NAMES}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Vim:
    return build_patch_model(Vim, variant, pretrained, **{"stem": "patch", "aux_head": False, **kwargs})


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim of width 192 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("vim_tiny", pretrained, **{"embed_dim": 192, "depth": 24, **kwargs})


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim of width 384 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("vim_small", pretrained, **{"embed_dim": 384, "depth": 24, **kwargs})


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim of width 768 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("vim_base", pretrained, **{"embed_dim": 768, "depth": 24, **kwargs})
