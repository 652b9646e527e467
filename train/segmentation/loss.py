"""The loss of a segmentation run: cross-entropy of each labeled pixel.

Legend: B images; C classes; S input side.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import InputError
from pipeline.batch import Batch


class SegmentationLoss(nn.Module):
    """Cross-entropy, summed over labeled pixels and divided by all pixels.

    Pixels without a class count as 0, as in mmsegmentation: so the loss of a batch is the mean of its parts' losses,
    and gradient accumulation changes nothing.

    Args:
        ignore_index: id of pixels without a class.
        auxiliary: weight of the auxiliary head's loss.
    """

    temperature = 1.0  # set by the trainer, without effect

    def __init__(self, ignore_index: int, auxiliary: float = 0.0) -> None:
        super().__init__()
        self.ignore_index, self.auxiliary = ignore_index, auxiliary

    def forward(self, outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], batch: Batch) -> torch.Tensor:
        """The loss.

        Args:
            outputs: scores [B, C, S, S]; or those of the decoder and of the auxiliary head.
            batch: images with masks.

        Returns:
            A scalar, float32.

        Raises:
            InputError: the batch has no masks.
        """
        if batch.masks is None:
            raise InputError("the batch has no masks", expected="a loader with masks=")
        main, other = outputs if isinstance(outputs, tuple) else (outputs, None)
        loss = self._of(main, batch.masks)
        return loss if other is None else loss + self.auxiliary * self._of(other, batch.masks)

    def _of(self, scores: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        target = masks.long()
        total = F.cross_entropy(scores.float(), target, ignore_index=self.ignore_index, reduction="sum")
        return total / target.numel()
