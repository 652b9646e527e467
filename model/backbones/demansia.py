"""DeMansia: Vision Mamba with LV-ViT's stem and token labels. The sizes below are registered with timm.

| name | width | layers | image | parameters |
|---|---|---|---|---|
| demansia_pico | 64 | 12 | 224² | ours, with half the channels in its stem |
| demansia_nano | 128 | 12 | 224² | ours |
| demansia_tiny | 192 | 24 | 224² | 8.06M, as published |
| demansia_small | 384 | 24 | 384² | 27.7M, as published |
| demansia_medium | 576 | 24 | 224² | 58.5M; ours, beside LV-ViT-M: 55.8M |
| demansia_base | 768 | 24 | 224² | 101.0M; ours, beside Vim-B: 97.6M |
| demansia_large | 960 | 24 | 224² | 155.0M; ours, beside LV-ViT-L: 150.0M |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm import create_model
from timm.models import generate_default_cfgs, register_model
from torch import nn

from model.backbones.published import MIXER, PROJECTION, STEM, mamba_arguments, registered_size
from model.backbones.timm_interface import build_patch_model, fit_position_embedding, untrained_cfg
from model.backbones.vision_mamba import VisionMamba
from model.families import Family, PublishedWeights, State, register_family


class DeMansia(VisionMamba):
    """DeMansia: `VisionMamba` with a convolutional stem, the class token in the middle and an auxiliary head."""


SIZES: dict[str, dict[str, Any]] = {
    "demansia_pico": {"embed_dim": 64, "depth": 12, "stem_width": 32},
    "demansia_nano": {"embed_dim": 128, "depth": 12},
    "demansia_tiny": {"embed_dim": 192, "depth": 24},
    "demansia_small": {"img_size": 384, "embed_dim": 384, "depth": 24},
    "demansia_medium": {"embed_dim": 576, "depth": 24},
    "demansia_base": {"embed_dim": 768, "depth": 24},
    "demansia_large": {"embed_dim": 960, "depth": 24},
}
NAMES = tuple(SIZES)
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": untrained_cfg(size.get("img_size", 224)) for name, size in SIZES.items()}
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> DeMansia:
    return build_patch_model(DeMansia, variant, pretrained, **{**SIZES[variant], **kwargs})


@register_model
def demansia_pico(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 64 with 12 layers and a stem of width 32; `kwargs` as for `VisionMamba`."""
    return _create("demansia_pico", pretrained, kwargs)


@register_model
def demansia_nano(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 128 with 12 layers; `kwargs` as for `VisionMamba`."""
    return _create("demansia_nano", pretrained, kwargs)


@register_model
def demansia_tiny(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 192 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("demansia_tiny", pretrained, kwargs)


@register_model
def demansia_small(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 384 with 24 layers, for 384² pixels; `kwargs` as for `VisionMamba`."""
    return _create("demansia_small", pretrained, kwargs)


@register_model
def demansia_medium(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 576 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("demansia_medium", pretrained, kwargs)


@register_model
def demansia_base(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 768 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("demansia_base", pretrained, kwargs)


@register_model
def demansia_large(pretrained: bool = False, **kwargs: Any) -> DeMansia:
    """DeMansia of width 960 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("demansia_large", pretrained, kwargs)


def _recognize(state: State) -> bool:
    return {f"{MIXER}A_log", f"{MIXER}x_proj.weight", STEM, "pos_embed"} <= state.keys()


def _builder(weights: PublishedWeights) -> Callable[[], nn.Module]:
    arguments = mamba_arguments(weights, 2 * weights.state[PROJECTION].shape[-1])
    arguments["stem_width"] = len(weights.state[STEM])
    name = registered_size(SIZES, arguments)
    return partial(create_model, name, **arguments) if name else partial(DeMansia, **arguments)


register_family(
    Family(
        "DeMansia",
        NAMES,
        _recognize,
        _builder,
        convert=fit_position_embedding,
        token_head={"aux_head": True},
        projections=("in_proj", "out_proj"),
    )
)
