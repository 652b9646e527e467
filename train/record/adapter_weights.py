"""The weights of a network with adapters: the part that is trained, the part that stays, and both merged.

peft's names: a layer X with an adapter holds `X.base_layer.weight`, frozen, and the factors `X.lora_A.default.weight`
and `X.lora_B.default.weight`; its output is that of base + scale · B · A.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"

State = dict[str, torch.Tensor]


def has_adapters(net: nn.Module) -> bool:
    """Whether a network has adapters."""
    return any(name.endswith(DOWN) for name, _ in net.named_parameters())


def split_weights(net: nn.Module, state: Mapping[str, torch.Tensor]) -> tuple[State, State]:
    """Split a state dict into what is trained and what stays, buffers included.

    Args:
        net: the network; what of it needs a gradient is trained.
        state: its state dict, or that of its moving average.

    Returns:
        The two parts.
    """
    learned = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    trained = {name: value for name, value in state.items() if name in learned}
    return trained, {name: value for name, value in state.items() if name not in learned}


def merge_adapters(state: Mapping[str, torch.Tensor], scale: float) -> State:
    """The state dict of the same network without adapters: each is added to the weight that it goes with.

    Args:
        state: a whole state dict, with adapters.
        scale: factor of their products.

    Returns:
        A state dict of the plain network.
    """
    merged = {}
    for name, value in state.items():
        if name.endswith((DOWN, UP)):
            continue
        layer, inside, kind = name.rpartition(BASE)
        if inside and kind == "weight":
            up, down = (state[f"{layer}{end}"].float() for end in (UP, DOWN))
            value = (value.float() + scale * (up @ down)).to(value.dtype)
        merged[f"{layer}.{kind}" if inside else name] = value
    return merged
