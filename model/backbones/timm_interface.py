"""What backbones on patches give to timm: a configuration, a builder, and state dicts resized to the model's grid.

Legend: h×w token grid, T = h·w tokens; L = T + 1 sequence length; D model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.patch_model import PatchModel
from model.token_heads import resize_position_embedding


def fit_position_embedding(state: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Resize the position embedding of a state dict to the model's grid.

    A state dict does not record its grid. If the length is the model's, the grid is taken to be the model's too;
    otherwise the image is taken to have been square.

    Args:
        state: weights, perhaps with a "pos_embed" [1, L, D].
        model: the model to load them into; if it is not a `PatchModel`, nothing is resized.

    Returns:
        A copy of `state` that fits the model's grid.

    Raises:
        ModelError: the position embedding is not that of a square image.
    """
    fitted = dict(state)
    embedding = fitted.get("pos_embed")
    if not isinstance(model, PatchModel) or embedding is None or embedding.ndim != 3:
        return fitted
    if embedding.shape != model.pos_embed.shape:
        tokens = embedding.shape[1] - 1
        side = math.isqrt(max(tokens, 0))
        if tokens < 1 or side * side != tokens:
            raise ModelError(
                "pos_embed cannot be resized, as its grid is unknown",
                got=f"{tokens} tokens",
                expected="a square number",
                remedy="Load them into a model built with their image size, then call its set_input_size().",
            )
        old, new = (model.cls_position(n) for n in (embedding.shape[1], model.pos_embed.shape[1]))
        fitted["pos_embed"] = resize_position_embedding(embedding, (side, side), model.grid, old, new)
    return fitted


def untrained_cfg(
    side: int = 224,
    first_conv: str = "patch_embed.conv1",
    classifier: str | tuple[str, ...] = ("head", "aux_head"),
) -> dict[str, Any]:
    """timm's configuration of a model without weights to download.

    Args:
        side: image side in pixels.
        first_conv: name of the first convolution.
        classifier: names of the heads.

    Returns:
        An entry of timm's `default_cfgs`.
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
    }


def build_patch_model(model_cls: type[PatchModel], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build a registered model as timm does, with resized position embeddings and `features_only`.

    Args:
        model_cls: the model's class.
        variant: its registered name.
        pretrained: load pretrained weights.
        kwargs: for the constructor and `build_model_with_cfg`.

    Returns:
        The model, or its feature extractor with `features_only`.
    """
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=fit_position_embedding,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )
