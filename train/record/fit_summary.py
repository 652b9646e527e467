"""The result of a run, which is kept in its folder as `summary.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from labeler.base.whole_files import replace_file

FILE = "summary.json"
TITLES = {"top1": "top-1", "top5": "top-5", "miou": "mean IoU", "pixel_accuracy": "pixel accuracy"}


@dataclass(frozen=True)
class FitSummary:
    """Result of a run.

    Attributes:
        folder: the run's folder.
        steps: steps done.
        epochs: epochs done.
        top1: accuracy of the last evaluation; −1: there was none.
        ema_top1: the same for the moving average of the weights.
        best: best accuracy of all evaluations; −1: there was none.
        images_per_s: training speed over all ranks, without evaluations, measured in this process. If nothing was left
            to do, that of the process that finished the run; so are `data_wait` and `seconds`.
        data_wait: share of that time spent waiting for data.
        seconds: duration of this process's part of the run.
        skipped: steps skipped because loss or gradient were not finite.
        best_step: step of the best evaluation; −1: there was none.
        measure: what `top1`, `ema_top1` and `best` are: "top1", or "miou" of a segmentation run.
    """

    folder: str
    steps: int
    epochs: float
    top1: float
    ema_top1: float
    best: float
    images_per_s: float
    data_wait: float
    seconds: float
    skipped: int
    best_step: int = -1
    measure: str = "top1"

    def text(self) -> str:
        """The summary in one line."""
        ema = f", of the moving average {self.ema_top1:.2%}" if self.ema_top1 >= 0 else ""
        best = f"best {self.best:.2%} at step {self.best_step:,}"
        accuracy = f"{TITLES[self.measure]} {self.top1:.2%}{ema}, {best}" if self.top1 >= 0 else "no evaluation"
        return (
            f"{self.steps:,} steps ({self.epochs:.1f} epochs): {accuracy}; {self.images_per_s:,.0f} images/s, "
            f"{self.data_wait:.0%} of the time waiting for data; {self.seconds:,.0f} s; {self.folder}"
        )

    def write(self, folder: Path) -> None:
        """Write it to the run's folder."""
        replace_file(folder / FILE, json.dumps(asdict(self), indent=1).encode() + b"\n")


def read_summary(folder: Path) -> FitSummary | None:
    """The summary in a run's folder; None: there is none that can be read."""
    try:
        return FitSummary(**json.loads((folder / FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
