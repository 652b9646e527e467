"""What a block needs of its mixer, and the mixers by name.

Legend: B images; L sequence length; D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import nn

from labeler.base.errors import ModelError, did_you_mean

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_builders: dict[str, Callable[..., nn.Module]] = {}


@runtime_checkable
class Mixer(Protocol):
    """A module [B, L, D] -> [B, L, D] that passes information between the tokens of a sequence.

    Attributes:
        out_proj: the last linear layer. A model divides its initial weights by the square root of its number of blocks.
    """

    out_proj: nn.Linear

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def no_weight_decay(self) -> set[str]:
        """Names of the mixer's parameters that should have no weight decay; timm adds norms and biases."""
        ...

    def macs_per_token(self) -> dict[str, int]:
        """Multiply-adds per token in the mixer's own operators, by the name that the summary lists them under.

        What torch's operators compute, such as matrix products and convolutions, is not part of it: the summary counts
        that while the model runs.
        """
        ...


def register_mixer(name: str) -> Callable[[Builder], Builder]:
    """Decorator that registers a mixer; one of the same name is replaced.

    Args:
        name: the name for `create_mixer`, and for the argument `mixer` of a backbone.

    Returns:
        A decorator of a class or function that takes the width D and options, and gives a `Mixer`.
    """

    def register(builder: Builder) -> Builder:
        _builders[name] = builder
        return builder

    return register


def create_mixer(name: str, width: int, **options: Any) -> Mixer:
    """Build a registered mixer.

    Args:
        name: a registered name, such as "mamba".
        width: model width D.
        options: passed to the mixer.

    Returns:
        The mixer, an `nn.Module`.

    Raises:
        ModelError: the name is not registered, or the mixer has no such option.
    """
    if name not in _builders:
        raise ModelError("unknown mixer", got=repr(name), remedy=did_you_mean(name, list(_builders), or_all=True))
    builder = _builders[name]
    known = inspect.signature(builder).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        for option in options.keys() - known.keys():
            remedy = did_you_mean(option, [*known][1:], or_all=True)
            raise ModelError(f"the mixer {name!r} has no such option", got=repr(option), remedy=remedy)
    return cast(Mixer, builder(width, **options))
