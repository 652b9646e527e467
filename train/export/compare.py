"""An exported file beside the run: the differences of their answers, and their speed.

Legend: B images; C classes; S input side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARM_UPS, FEWEST, SECONDS = 3, 10, 1.0


@dataclass(frozen=True)
class Comparison:
    """The answers of an exported file beside the run's.

    Attributes:
        images: how many.
        largest_difference: of all logits.
        relative_difference: the same, divided by the largest logit of the run, where that is above 1.
        agreement: share of the images with the same most probable class.
        top1: share that the file classifies right; None: the images have no classes that the run knows.
        run_top1: the same of the run.
    """

    images: int
    largest_difference: float
    relative_difference: float
    agreement: float
    top1: float | None
    run_top1: float | None

    def text(self) -> str:
        """The comparison in one line."""
        right = ""
        if self.top1 is not None and self.run_top1 is not None:
            right = f"; top-1 {self.top1:.2%}, in torch {self.run_top1:.2%}"
        return (
            f"{self.images:,} images in batches of 1 to 8: logits differ by at most {self.largest_difference:.1e}, "
            f"the same class for {self.agreement:.2%}{right}"
        )


def compare(
    run: Callable[[torch.Tensor], torch.Tensor],
    net: Callable[[torch.Tensor], torch.Tensor],
    batches: Sequence[torch.Tensor],
    labels: Sequence[int] | None,
) -> Comparison:
    """Compare two networks.

    Args:
        run: the exported one, images [B, 3, S, S] -> logits [B, C].
        net: the run's own.
        batches: the images.
        labels: their true classes; None: unknown.

    Returns:
        The comparison.
    """
    with torch.inference_mode():
        found = torch.cat([run(batch).float() for batch in batches])
        expected = torch.cat([net(batch).float() for batch in batches])
    difference = (found - expected).abs().max().item()
    classes, own = found.argmax(1), expected.argmax(1)
    true = None if labels is None else torch.tensor(labels)
    return Comparison(
        images=len(found),
        largest_difference=difference,
        relative_difference=difference / max(1.0, expected.abs().max().item()),
        agreement=(classes == own).float().mean().item(),
        top1=None if true is None else (classes == true).float().mean().item(),
        run_top1=None if true is None else (own == true).float().mean().item(),
    )


def milliseconds(run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> float:
    """The median time of a pass in milliseconds, of at least ten passes and a second, after three others."""
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(WARM_UPS):
            run(images)
        while len(times) < FEWEST or sum(times) < SECONDS:
            started = time.perf_counter()
            run(images)
            times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
