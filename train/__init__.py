"""Loss, training loop, evaluation and checkpoints. Imports `pipeline` and `model`."""

from __future__ import annotations

from train.config import TrainConfig
from train.loss import TokenLabelLoss
from train.recipe import load_recipe
from train.trainer import FitSummary, fit

__all__ = ["FitSummary", "TokenLabelLoss", "TrainConfig", "fit", "load_recipe"]
