"""The network of a recipe and its initial weights."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from pydantic import ValidationError
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from labeler.base.errors import InputError, IntegrityError, ModelError, did_you_mean
from model import load_reference_checkpoint, token_label
from model.checkpoints import read_state_dict
from model.families import family_of_name
from model.token_heads import TokenLabelHeads
from train.recipes.config import BEGINNING, ModelConfig
from train.record.adapter_weights import has_adapters
from train.record.checkpoint import CheckpointInfo, read_weights
from train.record.checkpoint_folders import checkpoint_of, find_checkpoint

log = logging.getLogger("train")


def build_network(config: ModelConfig, dense_weight: float = 1.0) -> TokenLabelHeads:
    """Build the model with its initial weights, on the CPU. Call `set_classes` when the data's classes are known.

    Args:
        config: the recipe's section `model`.
        dense_weight: weight of the token loss; 0 also changes the default of `aux_weight` to 0.

    Returns:
        The model.

    Raises:
        InputError: settings or weights do not fit.
    """
    net = _create(config, config.num_classes, config.img_size) if config.weights is None else _from_weights(config)
    net.aux_weight = config.aux_weight if config.aux_weight is not None else (0.5 if dense_weight else 0.0)
    if config.train == "heads":
        _freeze_all_but_heads(net)
    return net


def as_checkpointed(config: ModelConfig, info: CheckpointInfo) -> ModelConfig:
    """The configuration of the same model without initial weights, as a checkpoint's are loaded.

    Args:
        config: the recipe's section `model`.
        info: the checkpoint's record.

    Returns:
        The configuration, with the checkpoint's number of classes.
    """
    return _blank(config).model_copy(update={"weights": None, "num_classes": info.num_classes})


def _blank(config: ModelConfig) -> ModelConfig:
    """The configuration of the same model with random weights."""
    args = {key: value for key, value in config.args.items() if key not in BEGINNING}
    return config.model_copy(update={"args": {**args, "pretrained": False}})


def set_classes(net: TokenLabelHeads, num_classes: int, aux_classes: int | None, config: ModelConfig) -> None:
    """Replace each head whose number of classes is not that of the data; logged if it was trained.

    Args:
        net: the model.
        num_classes: classes of the data.
        aux_classes: classes of the token targets; None: the same classes.
        config: the recipe's section `model`.
    """
    aux_head, aux_count = net.aux_head, net.aux_outputs()
    if net.num_classes != num_classes:
        if config.begins_trained:
            log.info("new heads for %d classes replace trained ones for %d", num_classes, net.num_classes)
        net.reset_classifier(num_classes)  # type: ignore[operator]
    if net.aux_classes != aux_classes:
        net.reset_aux_head(aux_classes)  # type: ignore[operator]
    if net.aux_outputs() == aux_count:
        net.aux_head = aux_head


def restore_network(info: CheckpointInfo, state: dict[str, torch.Tensor]) -> TokenLabelHeads:
    """Rebuild the model of a checkpoint, in evaluation mode.

    Args:
        info: the checkpoint's record.
        state: its weights.

    Returns:
        The model.

    Raises:
        IntegrityError: the record or the weights are not those of a model.
    """
    try:
        settings = ModelConfig.model_validate(info.model)
    except ValidationError as error:
        fault = error.errors()[0]
        got = f"{'.'.join(map(str, ('model', *fault['loc'])))}: {fault['msg']}"
        raise IntegrityError("the checkpoint's record does not describe a model", got=got) from None
    config = as_checkpointed(settings, info)
    net = _create(config, config.num_classes, config.img_size, info.aux_classes)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        got = " ".join(str(error).split())[:200]
        raise IntegrityError(f"the checkpoint's weights do not fit its model {config.name!r}", got=got) from None
    net.aux_weight = info.aux_weight
    return net.eval()


def train_mode(net: nn.Module, config: ModelConfig) -> None:
    """Set training mode; frozen parts stay in evaluation mode.

    Args:
        net: the model.
        config: the recipe's section `model`.
    """
    net.train(config.train == "all")
    net.training = True  # so that it returns both outputs, even if everything else is frozen
    if config.freeze_statistics or has_adapters(net):
        for module in net.modules():
            if isinstance(module, (_BatchNorm, BatchNormAct2d)):
                module.eval()


def _create(
    config: ModelConfig, num_classes: int | None, img_size: int, aux_classes: int | None = None
) -> TokenLabelHeads:
    if not timm.is_model(config.name) and ":" not in config.name:  # "hf-hub:…" and "local-dir:…" are not in timm's list
        names = timm.list_models()
        remedy = did_you_mean(config.name, names) or "`python -m model list` and timm.list_models() list all."
        raise InputError("unknown model.name", got=repr(config.name), remedy=remedy)
    kwargs: dict[str, Any] = dict(config.args)
    if config.drop_path_rate:
        kwargs["drop_path_rate"] = config.drop_path_rate
    begin = kwargs.get("checkpoint_path")
    if begin and not Path(str(begin)).is_file():
        raise InputError("model.args.checkpoint_path is not a file", got=repr(begin))
    try:
        return token_label(config.name, num_classes, img_size=img_size, aux_classes=aux_classes, **kwargs)
    except ModelError as error:
        raise InputError(f"model.name {config.name!r} cannot be built", got=error) from None
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        got = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "See model.args, model.img_size and model.drop_path_rate."
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", got):
            got, remedy = f"{unknown[1]}, which it does not accept", _without(unknown[1], config)
        raise InputError(
            f"model {config.name!r} cannot be built with these settings", got=got, remedy=remedy
        ) from None  # fmt: skip


def _without(argument: str, config: ModelConfig) -> str:
    """How to unset a setting, which may come from a recipe for another model."""
    if argument not in config.args:
        return f"Set model.{argument}=0."
    return f"model.args sets {', '.join(config.args)}; model.args={{}} unsets all of them."


def _from_weights(config: ModelConfig) -> TokenLabelHeads:
    """Build the model to fit the weights, load them, and then change to the recipe's resolution and classes."""
    path = Path(str(config.weights))
    config = _blank(config)
    begin = begin_with(path, config)
    state, side = begin.state, begin.side
    net = _create(config, begin.classes, side, begin.aux_classes)
    missing = [key for key in net.state_dict() if key not in state and not key.startswith("aux_head.")]
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    wrong = [key for key, value in state.items() if shapes.get(key) != value.shape]
    if missing or wrong:
        raise InputError(
            f"{path} does not fit model.name {config.name!r}",
            got=f"{len(missing)} weights missing, {len(wrong)} of another name or shape "
            f"({', '.join([*missing, *wrong][:3])})",
            expected="the weights of the same model",
            remedy=f"Set model.name and model.args to those of the weights: {begin.described}.",
        )
    net.load_state_dict(state, strict=False)
    if side != config.img_size:
        net.set_input_size(config.img_size)  # type: ignore[operator]
        _refuse_other_shapes(net, _create(config, begin.classes, config.img_size, begin.aux_classes), side)
    if config.new_heads:
        net.reset_classifier(begin.classes)  # type: ignore[operator]
        if begin.aux_classes is not None:
            net.reset_aux_head(begin.aux_classes)  # type: ignore[operator]
    return net


def _refuse_other_shapes(net: nn.Module, built: nn.Module, side: int) -> None:
    """Raise an error unless a resized model has the shapes of one built at that size, as a checkpoint rebuilds it."""
    shapes, expected = ({key: tuple(t.shape) for key, t in one.state_dict().items()} for one in (net, built))
    if wrong := [key for key in expected if shapes.get(key) != expected[key]]:
        raise InputError(
            f"this model cannot be trained at another resolution than its weights', {side}×{side}",
            got=f"{wrong[0]} {shapes.get(wrong[0])}", expected=f"{expected[wrong[0]]}, as when built at that size",
            remedy=f"Use model.img_size={side}, or a model without windows.",
        )  # fmt: skip


class Beginning(NamedTuple):
    """Initial weights.

    Attributes:
        state: a state dict of the network.
        classes: classes of their class head.
        side: their resolution.
        described: their model, for messages.
        aux_classes: classes of their auxiliary head; None: those of the class head.
    """

    state: dict[str, torch.Tensor]
    classes: int
    side: int
    described: str
    aux_classes: int | None = None


def begin_with(path: Path, config: ModelConfig) -> Beginning:
    """Reads initial weights.

    Args:
        path: a run's folder, one of its checkpoints, or a file of weights.
        config: the recipe's section `model`, for files that do not say of which model they are.

    Returns:
        The weights.

    Raises:
        InputError: they cannot be read.
    """
    ema = config.weights_ema
    recorded = checkpoint_of(path)
    if path.is_dir() or recorded:
        folder, info, averaged = recorded or (*find_checkpoint(path), False)
        ema = ema or averaged
        settings = ", ".join(f"{key} {value}" for key, value in info.model["args"].items())
        described = f"{info.model['name']} with {settings or 'its usual settings'}"
        state, side = read_weights(folder, info, ema), int(info.model["img_size"])
        return Beginning(state, info.num_classes, side, described, info.aux_classes)
    try:
        if family_of_name(config.name) is None:  # a timm backbone, which `TokenLabeled` wraps
            return _of_timm(read_state_dict(path, ema), config)
        net = load_reference_checkpoint(path, ema=ema)
    except ModelError as error:
        raise InputError("model.weights cannot be read", got=error) from None
    size = net.img_size
    if size[0] != size[1]:  # type: ignore[index]
        raise InputError(f"{path} is not for square images", got=size)
    described = f"{type(net).__name__} with embed_dim {net.embed_dim}, depth {len(net.feature_info)}"  # type: ignore[arg-type]
    return Beginning(net.state_dict(), net.num_classes, size[0], described)  # type: ignore[arg-type, index]


def _of_timm(state: dict[str, torch.Tensor], config: ModelConfig) -> Beginning:
    """As `begin_with`, for a state dict of the backbone or of the whole network, which does not record its size."""
    described = f"of a model with {', '.join([*state][:3])}, …"
    if not any(key.startswith("backbone.") for key in state):  # VOLO has its own auxiliary head
        state = {key if key.startswith("aux_head.") else f"backbone.{key}": value for key, value in state.items()}
    net = _create(config, None, config.img_size)
    usual = getattr(net, "pretrained_cfg", None) or {}
    head = usual.get("classifier") or "head"
    weight = state.get(f"backbone.{head if isinstance(head, str) else head[0]}.weight")
    classes = int(net.num_classes) if weight is None else len(weight)
    for side in (config.img_size, usual.get("input_size", (0, config.img_size))[-1]):
        if _fits(state, net if side == config.img_size else _create(config, None, side)):
            return Beginning(state, classes, side, described)
    return Beginning(state, classes, config.img_size, described)


def _fits(state: dict[str, torch.Tensor], net: TokenLabelHeads) -> bool:
    """Whether all shapes fit the network except for the first dimension, as heads may have other classes."""
    own = {key: value.shape[1:] for key, value in net.state_dict().items()}
    return all(own.get(key) == value.shape[1:] for key, value in state.items())


def heads_of(net: TokenLabelHeads) -> list[nn.Module]:
    """The class heads and the auxiliary head, if there is one."""
    heads: Any = net.get_classifier()  # type: ignore[operator]
    own = list(heads) if isinstance(heads, (tuple, list)) else [heads]
    return own if net.aux_head is None else [*own, net.aux_head]


def _freeze_all_but_heads(net: TokenLabelHeads) -> None:
    net.requires_grad_(False)
    for head in heads_of(net):
        head.requires_grad_(True)
