"""MambaVision: convolutions on the fine grids, Mamba mixers and attention on the coarse ones; its sizes, for timm.

Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone" (2024). An implementation of our own.

Legend: B images; C classes; D width of the last level; h×w token grid, T = h·w tokens.

| name | widths | blocks | heads | image | parameters | with the token head |
|---|---|---|---|---|---|---|
| mambavision_nano | 32, 64, 128 | 1, 2, 2 | – | 224² | 0.7M | ours |
| mambavision_tiny | 80 … 640 | 1, 3, 8, 4 | 8, 16 | 224² | 31.8M | 32.4M |
| mambavision_tiny2 | 80 … 640 | 1, 3, 11, 4 | 8, 16 | 224² | 35.1M | 35.7M |
| mambavision_small | 96 … 768 | 3, 3, 7, 5 | 8, 16 | 224² | 50.1M | 50.9M |
| mambavision_base | 128 … 1024 | 3, 3, 10, 5 | 8, 16 | 224² | 97.7M | 98.7M |
| mambavision_large | 196 … 1568 | 3, 3, 10, 5 | 16, 32 | 224² | 228.0M | 229.5M |
| mambavision_large2 | 196 … 1568 | 3, 3, 12, 5 | 16, 32 | 224² | 241.5M | 243.1M |
| mambavision_large3 | 256 … 2048 | 3, 3, 20, 10 | 16, 32 | 256² | 739.6M | 741.6M |

Tokens of the last level, which the token head reads, are 32×32 pixels. They are mixed where the third level begins, on
its grid of 16×16 pixels, after the levels of convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm import create_model
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.hierarchical.mambavision_model import MambaVision
from model.backbones.timm_interface import untrained_cfg
from model.families import Family, PublishedWeights, State, register_family

SCALED = {"layer_scale": 1e-5, "num_heads": (4, 8, 16, 32)}
SIZES: dict[str, dict[str, Any]] = {
    "mambavision_nano": {"embed_dim": 32, "stem_width": 16, "depths": (1, 2, 2), "num_heads": (1, 2, 4)},
    "mambavision_tiny": {"embed_dim": 80, "stem_width": 32, "depths": (1, 3, 8, 4)},
    "mambavision_tiny2": {"embed_dim": 80, "stem_width": 32, "depths": (1, 3, 11, 4)},
    "mambavision_small": {"embed_dim": 96, "depths": (3, 3, 7, 5)},
    "mambavision_base": {"embed_dim": 128, "depths": (3, 3, 10, 5), "layer_scale": 1e-5},
    "mambavision_large": {"embed_dim": 196, "depths": (3, 3, 10, 5), **SCALED},
    "mambavision_large2": {"embed_dim": 196, "depths": (3, 3, 12, 5), **SCALED},
    "mambavision_large3": {"embed_dim": 256, "depths": (3, 3, 20, 10), "img_size": 256, **SCALED},
}
NAMES = tuple(SIZES)
OURS = {"fixed_input_size": False, "crop_pct": 1.0}
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": untrained_cfg(size.get("img_size", 224), "patch_embed.conv_down.0") | OURS
        for name, size in SIZES.items()
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> MambaVision:
    arguments = {**SIZES[variant], **kwargs}
    every = {"out_indices": tuple(range(len(arguments["depths"]))), "feature_cls": "getter"}
    return build_model_with_cfg(MambaVision, variant, pretrained, feature_cfg=every, **arguments)


@register_model
def mambavision_nano(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision, 32 wide with 5 blocks on three levels: a size of ours; `kwargs` as for `MambaVision`."""
    return _create("mambavision_nano", pretrained, kwargs)


@register_model
def mambavision_tiny(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T, 80 wide with 16 blocks; `kwargs` as for `MambaVision`."""
    return _create("mambavision_tiny", pretrained, kwargs)


@register_model
def mambavision_tiny2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T2, 80 wide with 19 blocks; `kwargs` as for `MambaVision`."""
    return _create("mambavision_tiny2", pretrained, kwargs)


@register_model
def mambavision_small(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-S, 96 wide with 18 blocks; `kwargs` as for `MambaVision`."""
    return _create("mambavision_small", pretrained, kwargs)


@register_model
def mambavision_base(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B, 128 wide with 21 blocks; `kwargs` as for `MambaVision`."""
    return _create("mambavision_base", pretrained, kwargs)


@register_model
def mambavision_large(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L, 196 wide with 21 blocks; `kwargs` as for `MambaVision`."""
    return _create("mambavision_large", pretrained, kwargs)


@register_model
def mambavision_large2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2, 196 wide with 23 blocks; published for 224² and, by img_size=512, for 512² pixels."""
    return _create("mambavision_large2", pretrained, kwargs)


@register_model
def mambavision_large3(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3, 256 wide with 36 blocks; published for 256² and, by img_size=512, for 512² pixels."""
    return _create("mambavision_large3", pretrained, kwargs)


STEM, SECOND = "patch_embed.conv_down.0.weight", "patch_embed.conv_down.3.weight"


def _recognize(state: State) -> bool:
    return {STEM, SECOND, "levels.0.blocks.0.conv1.weight"} <= state.keys()


def _builder(weights: PublishedWeights) -> Callable[[], nn.Module]:
    state = weights.state
    blocks = {tuple(key.split(".")[1:4:2]) for key in state if key.startswith("levels.") and ".blocks." in key}
    levels = [level for level, _ in blocks]
    width, depths = len(state[SECOND]), tuple(levels.count(str(i)) for i in range(len(set(levels))))
    name = next((name for name, size in SIZES.items() if (size["embed_dim"], size["depths"]) == (width, depths)), None)
    if name is None:
        raise ModelError(
            f"{weights.file} has no known MambaVision size, so its num_heads are unknown: got width {width}, "
            f"{depths} blocks, expected those of {', '.join(SIZES)}; pass model="
        )
    last = f"levels.{len(depths) - 1}.blocks.0."
    arguments = {
        "in_chans": state[STEM].shape[1],
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "aux_head": "aux_head.weight" in state,
        "stem_width": len(state[STEM]),
        "layer_scale": 1.0 if f"{last}gamma_1" in state else None,
    }
    return partial(create_model, name, **arguments)


def _unchanged(state: Mapping[str, Any], _: nn.Module) -> dict[str, Any]:
    return dict(state)


register_family(
    Family(
        "MambaVision",
        NAMES,
        _recognize,
        _builder,
        convert=_unchanged,
        token_head={"aux_head": True},
        projections=("in_proj", "out_proj", "qkv", "proj"),
    )
)
