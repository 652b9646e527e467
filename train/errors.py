"""Errors of training, in addition to those of `labeler.base.errors`."""

from __future__ import annotations

from labeler.base.errors import TokenLabelError
from labeler.base.signals import STOPPED


class TrainError(TokenLabelError):
    """A training run cannot continue; its checkpoints are kept, and `--resume auto` continues from the newest."""

    exit_status = 1


class NonFiniteError(TrainError):
    """The loss or its gradient is NaN or infinite."""


class Stopped(TokenLabelError):
    """A signal stopped the run; everything is saved."""

    exit_status = STOPPED
