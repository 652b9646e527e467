"""What can go wrong in training, beside what `labeler.base.errors` names."""

from __future__ import annotations

from labeler.base.errors import TokenLabelError


class TrainError(TokenLabelError):
    """A training run could not go on; its checkpoints are kept and `--resume auto` goes on from the newest."""

    exit_status = 1


class NonFiniteError(TrainError):
    """The loss is NaN or infinite."""


class Stopped(TokenLabelError):
    """A signal asked the run to stop; everything is saved."""

    exit_status = 143
