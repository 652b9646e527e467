"""Families of models: how published weights of each are recognized, built and converted. Backbones register theirs.

A new family does not go here: its file in `model/backbones/` ends with `register_family`, as `vim.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models import split_model_name_tag
from torch import nn

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PublishedWeights:
    """What a published checkpoint holds.

    Attributes:
        file: the file, for messages.
        state: its state dict, without prefixes of wrappers.
        settings: the arguments of the training script, an `argparse.Namespace` or, from Lightning, a dictionary; None:
            not saved.
    """

    file: Path
    state: State
    settings: Any = None


@dataclass(frozen=True)
class Family:
    """A family of models and its published checkpoints.

    Attributes:
        title: the family's name in messages, such as "LV-ViT".
        names: the models that it registers with timm.
        recognize: takes a state dict of any origin; whether it is one of this family's, by the names of its weights.
        builder: takes published weights; returns a function without arguments that builds the model which fits them.
            Raises ModelError if there is none.
        convert: takes a published state dict and the model to load it into; returns a state dict whose weights have the
            model's names and shapes, as timm's `checkpoint_filter_fn` does.
        token_head: arguments with which a model of these names has a token head, for `token_label`.
        projections: last parts of the names of its blocks' projections, which get adapters.
    """

    title: str
    names: tuple[str, ...]
    recognize: Callable[[State], bool]
    builder: Callable[[PublishedWeights], Callable[[], nn.Module]]
    convert: Callable[[State, nn.Module], State]
    token_head: Mapping[str, Any] = field(default_factory=dict)
    projections: tuple[str, ...] = ()


_families: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Register a family of models, so that `load_reference_checkpoint` and `token_label` know it.

    Args:
        family: the family; one of the same title is replaced.

    Returns:
        The family.
    """
    _families.pop(family.title, None)
    _families[family.title] = family
    return family


def families() -> tuple[Family, ...]:
    """All registered families, in the order of registration."""
    return tuple(_families.values())


def family_of_name(name: str) -> Family | None:
    """The family of a model.

    Args:
        name: a name for `timm.create_model`, with or without a tag.

    Returns:
        The family; None: the name is none of its models'.
    """
    architecture = split_model_name_tag(name)[0]
    return next((family for family in families() if architecture in family.names), None)


def family_of_state(state: State) -> Family | None:
    """The family of a state dict.

    Args:
        state: a published state dict.

    Returns:
        The family; None: no family recognizes it. The family that was registered last is asked first.
    """
    return next((family for family in reversed(families()) if family.recognize(state)), None)
