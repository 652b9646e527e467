"""Loss, training loop, evaluation and checkpoints. Imports `pipeline` and `model`.

Importing this package does not import torch, so that `python -m train doctor` works where torch is broken; each name
below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.loss.token_label_loss import TokenLabelLoss
    from train.recipes.config import TrainConfig
    from train.recipes.recipe import load_recipe
    from train.record.fit_summary import FitSummary
    from train.trainer import fit

_HOMES = {
    "FitSummary": "record.fit_summary",
    "TokenLabelLoss": "loss.token_label_loss",
    "TrainConfig": "recipes.config",
    "fit": "trainer",
    "load_recipe": "recipes.recipe",
}

__all__ = ["FitSummary", "TokenLabelLoss", "TrainConfig", "fit", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"train.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
