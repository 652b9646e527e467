"""Backbones by name, and token labeling for any of them: `token_label("resnet50")`.

Legend: h×w token grid.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.layers import to_2tuple
from torch import nn

from labeler.base.errors import ModelError
from model.families import family_of_name
from model.feature_maps import Size
from model.token_heads import TokenLabelHeads
from model.wrapper import TokenLabeled


def token_label(
    name_or_module: str | nn.Module,
    num_classes: int | None = None,
    grid: int | Size | None = None,
    pretrained: bool = False,
    aux_classes: int | None = None,
    **timm_kwargs: Any,
) -> TokenLabelHeads:
    """Add an auxiliary token head to a timm backbone.

    Args:
        name_or_module: a name for `timm.create_model`, or a model that is already built.
        num_classes: classes of the class head; None: as many as the backbone has.
        grid: h, w of the auxiliary logits; None: the grid of the backbone's own features.
        pretrained: load timm's pretrained weights (for a name).
        aux_classes: classes of the auxiliary head, if they are others, as those of a teacher are; None: the same
            classes.
        timm_kwargs: passed to `timm.create_model`. `img_size` may also be given for a backbone without such a setting,
            and `img_size` and `in_chans` for a model that is already built: they describe the images it will get.

    Returns:
        The model with both heads: a `TokenLabeled`, or the backbone itself if it has its own token head.

    Raises:
        ModelError: the backbone returns no feature map, or the arguments do not fit it.
    """
    net = name_or_module
    if isinstance(net, str):
        family = family_of_name(net)
        classes = {} if num_classes is None else {"num_classes": num_classes}
        heads = {} if family is None else dict(family.token_head)
        if family is not None and aux_classes is not None:
            heads["aux_classes"] = aux_classes
        net = create_backbone(net, **{**heads, "pretrained": pretrained, **timm_kwargs, **classes})
    elif unknown := timm_kwargs.keys() - {"img_size", "in_chans"}:
        raise ModelError(
            "arguments for a model that is already built",
            got=", ".join(sorted(unknown)),
            expected="img_size or in_chans",
        )
    elif num_classes not in (None, getattr(net, "num_classes", None)):
        net.reset_classifier(num_classes)  # type: ignore[operator]
    if not isinstance(net, TokenLabelHeads):
        return TokenLabeled(net, grid, timm_kwargs.get("img_size"), timm_kwargs.get("in_chans"), aux_classes)
    if net.aux_classes != aux_classes:
        net.reset_aux_head(aux_classes)  # type: ignore[operator]
    if net.aux_head is None or (grid is not None and to_2tuple(grid) != getattr(net, "grid", None)):
        raise ModelError(f"{type(net).__name__} has its own token head: build it with aux_head=True, without grid")
    return net


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, but without `img_size` for backbones that do not take it.

    Args:
        name: a name of `timm.list_models()`.
        kwargs: passed to `timm.create_model`.

    Returns:
        The backbone.

    Raises:
        ModelError: timm does not know the name.
    """
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        if "img_size" not in kwargs or "img_size" not in str(error):
            raise
    except RuntimeError as error:
        if "Unknown model" in str(error):
            raise ModelError(f"unknown model: got {name!r}, expected a name of timm.list_models()") from error
        raise
    return timm.create_model(name, **{key: value for key, value in kwargs.items() if key != "img_size"})
