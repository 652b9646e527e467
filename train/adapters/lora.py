"""Adapters for the layers that a recipe names, or that its model's family has for it. peft is imported here alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from labeler.base.errors import InputError, did_you_mean
from model.families import family_of_name
from model.token_heads import TokenLabelHeads
from train.network import heads_of
from train.recipes.config import LoraConfig

# The linear layers of attention in timm's models.
ATTENTION = ("qkv", "q", "k", "v", "kv", "proj")
INSTALL = "pip install 'token-labeling[lora]', or lora.rank=none."


def add_adapters(net: TokenLabelHeads, config: LoraConfig, name: str) -> None:
    """Put adapters beside the chosen layers and freeze everything else but the heads. Without a rank, do nothing.

    Args:
        net: the network, with its initial weights; it is changed.
        config: the recipe's section `lora`.
        name: the model's name, whose family knows its projections.

    Raises:
        InputError: peft is not installed, or a target is no linear layer of the network.
    """
    if config.rank is None:
        return
    layers = target_layers(net, config.targets, name)
    try:
        import peft
    except ImportError as error:
        raise InputError("lora.rank needs peft, which cannot be imported", got=error, remedy=INSTALL) from None
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.scale * config.rank, target_modules=layers)
    peft.inject_adapter_in_model(settings, net)
    for head in heads_of(net):
        head.requires_grad_(True)


def target_layers(net: TokenLabelHeads, targets: Iterable[str] | None, name: str) -> list[str]:
    """The names of the layers that get adapters.

    Args:
        net: the network.
        targets: last parts of their names; None: the projections of the model's family.
        name: the model's name.

    Returns:
        Their full names.

    Raises:
        InputError: a target is no linear layer of the network, or none is known for such a model.
    """
    heads = {id(module) for head in heads_of(net) for module in head.modules()}
    modules = {path: module for path, module in net.named_modules() if id(module) not in heads}
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    if targets is None:
        family = family_of_name(name)
        usual = ATTENTION if family is None else family.projections
        layers = [path for path in linear if _ends(path, usual)]
        if not layers:
            raise InputError(
                f"no usual layers for adapters are known for {name!r}",
                expected="a transformer of timm's, or one of our models",
                remedy=f"Set lora.targets; its linear layers are {_last_parts(linear)}.",
            )
        return layers
    for target in targets:
        if not any(_ends(path, (target,)) for path in linear):
            raise _no_layer(target, net, modules, linear)
    return [path for path in linear if _ends(path, targets)]


def _ends(path: str, targets: Iterable[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _last_parts(paths: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths)) or "none"


def _no_layer(target: str, net: TokenLabelHeads, modules: dict[str, Any], linear: list[str]) -> InputError:
    """The error for a target that is no linear layer: something else of the network, or nothing at all."""
    others: dict[str, Any] = {**modules, **dict(net.named_parameters())}
    found = next((one for path, one in others.items() if _ends(path, (target,))), None)
    known = list(dict.fromkeys(path.rpartition(".")[2] for path in linear))
    if found is None:
        head = any(_ends(path, (target,)) for path, _ in net.named_modules())
        got = f"{target!r}, a head, which is trained whole" if head else repr(target)
        remedy = None if head else did_you_mean(target, known)
    else:
        kind = "a parameter" if isinstance(found, nn.Parameter) else f"of type {type(found).__name__}"
        got, remedy = f"{target!r}, {kind}", None
    return InputError(
        "lora.targets names no linear layer", got=got, expected=f"one of {', '.join(known) or 'none'}", remedy=remedy
    )
