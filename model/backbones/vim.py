"""Vision Mamba (Zhu et al., 2024): bidirectional Mamba on plain patches, class token in the middle."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from timm import create_model
from timm.models import generate_default_cfgs, register_model
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.published import MIXER, PROJECTION, STEM, mamba_arguments, registered_size
from model.backbones.timm_interface import build_patch_model, fit_position_embedding, untrained_cfg
from model.backbones.vision_mamba import VisionMamba
from model.families import Family, PublishedWeights, State, register_family

TRAINING_SIDES = (224, 256, 384, 448, 512)  # pixels that pictures are usually cropped to


class Vim(VisionMamba):
    """Vim: `VisionMamba` with one linear projection per patch and no auxiliary head."""


SIZES: dict[str, dict[str, Any]] = {
    "vim_pico": {"embed_dim": 64, "depth": 12},
    "vim_tiny": {"embed_dim": 192, "depth": 24},
    "vim_small": {"embed_dim": 384, "depth": 24},
    "vim_base": {"embed_dim": 768, "depth": 24},
}
NAMES = tuple(SIZES)
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": untrained_cfg(first_conv="patch_embed.proj", classifier="head") for name in NAMES}
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Vim:
    arguments = {"stem": "patch", "aux_head": False, **SIZES[variant], **kwargs}
    return build_patch_model(Vim, variant, pretrained, **arguments)


@register_model
def vim_pico(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim of width 64 with 12 layers; `kwargs` as for `VisionMamba`."""
    return _create("vim_pico", pretrained, kwargs)


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim of width 192 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("vim_tiny", pretrained, kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim of width 384 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("vim_small", pretrained, kwargs)


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim of width 768 with 24 layers; `kwargs` as for `VisionMamba`."""
    return _create("vim_base", pretrained, kwargs)


def _recognize(state: State) -> bool:
    return {f"{MIXER}A_log", "pos_embed"} <= state.keys() and STEM not in state


def _builder(weights: PublishedWeights) -> Callable[[], nn.Module]:
    patch = weights.state[PROJECTION].shape[-1]
    arguments = mamba_arguments(weights, patch)
    if getattr(weights.settings, "input_size", None) is None:
        _refuse_overlap(weights, patch)
    name = registered_size(SIZES, arguments)
    return partial(create_model, name, **arguments) if name else partial(Vim, stem="patch", **arguments)


def _refuse_overlap(weights: PublishedWeights, patch: int) -> None:
    """Raise ModelError if the positions are probably those of overlapping patches, which no shape shows.

    Vim's patches overlap by half: s patches in a row are then (s + 1)·P/2 pixels instead of s·P. A file is refused if
    only the overlapping reading is a usual image side: 27, 31, 47, 55 or 63 patches of 16 pixels, which are rare
    without overlap.
    """
    side = math.isqrt(weights.state["pos_embed"].shape[1] - 1)
    overlapping, plain = (side + 1) * patch // 2, side * patch
    if overlapping in TRAINING_SIDES and plain not in TRAINING_SIDES:
        raise ModelError(
            f"{weights.file} does not say whether its patches overlap: got {side}×{side} positions for patches of "
            f"{patch}, expected the training script's settings beside the weights; if it was trained on {plain} "
            f"pixels, pass model= (built with img_size={plain}); {overlapping} pixels with overlapping patches are not "
            "supported"
        )


register_family(
    Family(
        "Vim",
        NAMES,
        _recognize,
        _builder,
        convert=fit_position_embedding,
        token_head={"aux_head": True},
        projections=("in_proj", "out_proj"),
    )
)
