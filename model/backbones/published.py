"""Constructor arguments of a model from the shapes of published weights, which do not record them.

Legend: C classes; T tokens; L = T + 1 sequence length; D model width; E inner width; N state size; P patch side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from labeler.base.errors import ModelError
from model.families import PublishedWeights

STEM = "patch_embed.conv1.weight"
PROJECTION = "patch_embed.proj.weight"
MIXER = "layers.0.mixer."


def patch_arguments(
    weights: PublishedWeights, patch: int, blocks: str, trained_at: int | None = None
) -> dict[str, Any]:
    """The arguments that all models on patches share.

    Args:
        weights: the published weights.
        patch: P in pixels.
        blocks: name of the list of blocks.
        trained_at: image side in training, in pixels; None: unknown.

    Returns:
        Arguments of the constructor.

    Raises:
        ModelError: the positions are not those of square images without overlapping patches.
    """
    state = weights.state
    length = state["pos_embed"].shape[1]
    side = math.isqrt(length - 1)
    if side**2 != length - 1 or trained_at not in (None, side * patch):
        raise ModelError(
            f"{weights.file} does not fit square images of {patch}-pixel patches: got {length} positions for "
            f"{trained_at or 'unknown'} pixels; overlapping patches are not supported; pass model= for other images"
        )
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "in_chans": state[STEM if STEM in state else PROJECTION].shape[1],
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "embed_dim": state["pos_embed"].shape[2],
        "depth": len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")}),
        "aux_head": "aux_head.weight" in state,
    }


def mamba_arguments(weights: PublishedWeights, patch: int) -> dict[str, Any]:
    """The arguments of a `VisionMamba` with the mixer "mamba".

    Args:
        weights: the published weights.
        patch: P in pixels.

    Returns:
        Arguments of the constructor.

    Raises:
        ModelError: as in `patch_arguments`.
    """
    state, settings = weights.state, weights.settings
    arguments = patch_arguments(weights, patch, "layers", getattr(settings, "input_size", None))
    # In Vim's files the model's name says what no shape shows; DeMansia has only one form.
    name = str(getattr(settings, "model", ""))
    name = name if "bimamba" in name else "middle_cls_div2"
    return arguments | {
        "d_state": state[f"{MIXER}A_log"].shape[1],
        "d_conv": state[f"{MIXER}conv1d.weight"].shape[2],
        "expand": len(state[f"{MIXER}A_log"]) // arguments["embed_dim"],
        "dt_rank": state[f"{MIXER}dt_proj.weight"].shape[1],
        "directions": "both" if f"{MIXER}A_b_log" in state else "forward",
        "layer_scale": 1.0 if f"{MIXER}gamma" in state else None,
        "halve": "div2" in name,
        "cls_place": "middle" if re.search("mid(dle_)?cls", name) else "start",
    }


def registered_size(sizes: Mapping[str, Mapping[str, Any]], arguments: Mapping[str, Any]) -> str | None:
    """The registered name with the same width and depth.

    Args:
        sizes: arguments of each registered name.
        arguments: arguments of the model.

    Returns:
        The name; None: no registered model has this size.
    """
    for name, size in sizes.items():
        if (size["embed_dim"], size["depth"]) == (arguments["embed_dim"], arguments["depth"]):
            return name
    return None
