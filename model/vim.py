"""Vision Mamba (Zhu et al., 2024): bidirectional Mamba on plain patches, class token in the middle."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from model.patch_model import fit_position_embedding
from model.vision_mamba import VisionMamba


class Vim(VisionMamba):
    """`VisionMamba` as Vim has it: one projection per patch, no auxiliary head."""


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


NAMES = ("vim_tiny", "vim_small", "vim_base")
default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in NAMES})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Vim:
    return build_model_with_cfg(
        Vim,
        variant,
        pretrained,
        pretrained_filter_fn=fit_position_embedding,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{"stem": "patch", "aux_head": False, **kwargs},
    )


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create("vim_tiny", pretrained, **{"embed_dim": 192, "depth": 24, **kwargs})


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create("vim_small", pretrained, **{"embed_dim": 384, "depth": 24, **kwargs})


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create("vim_base", pretrained, **{"embed_dim": 768, "depth": 24, **kwargs})
