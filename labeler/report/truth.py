"""The part of the report on the accuracy of the labels: figures of every row, and the results of an audit.

Legend: K images whose maps the audit kept; C classes; H×W map grid.
"""

from __future__ import annotations

import dataclasses
import io
import math
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from labeler.checks.audit import Audit
from labeler.choose_encoding import Cost, measure
from labeler.report.charts import bars, curve, scatter
from labeler.report.figures import Sample, TruthCheck
from labeler.store.label_store import LabelStore
from labeler.store.score_code import QUALITIES, share_of_reference

if TYPE_CHECKING:
    from torch import Tensor

# From coarser than the low quality to finer than the high one.
THRESHOLDS = tuple(round(float(t), 7) for t in np.geomspace(6e-3, 1e-4, 8))
STATS = ("kl", "coverage", "first_kept", "reference_kl", "compared_kl", "agree", "known")


def totals(store: LabelStore) -> dict[str, float]:
    """Returns the sums over all rows that all markers have."""
    return {
        name: sum(marker.stats[name] for marker in store.markers)
        for name in STATS
        if all(name in marker.stats for marker in store.markers)
    }


def cards(store: LabelStore, sample: Sample, truth: TruthCheck | None) -> list[tuple[str, str]]:
    """Returns (figure, meaning) of the figures at the top of the page."""
    rows, sums = max(1, len(store)), totals(store)
    figures = [(f"{store.bytes / rows:,.0f} B", "per image, with all files of the store"), *truth_cards(store)]
    if truth is not None:
        figures.append((f"{truth.right:.1%}", f"of {truth.cells:,} object cells have the right class"))
    if sums.get("known"):
        figures.append((f"{sums['agree'] / sums['known']:.1%}", "of images: the map’s class is the folder’s, all"))
    return [
        *figures,
        (f"{np.median(sample.confidence):.0%}", "median probability of a cell’s first class"),
        (f"{len(store.quarantine):,}", "images in the quarantine"),
    ]


def truth_cards(store: LabelStore) -> list[tuple[str, str]]:
    """Returns (figure, meaning) of figures over all rows; none for an imported store, which has no teacher."""
    sums, rows = totals(store), max(1, len(store))
    if store.meta.score_kind != "logprob" or not {"kl", "coverage"} <= sums.keys():
        return []
    figures = [(f"{sums['kl'] / rows:.4f}", "nats lost per cell: KL from the teacher’s full softmax to the store, all")]
    share = share_of_reference(sums.get("compared_kl", 0.0), sums.get("reference_kl", 0.0), rows)
    if share is not None:
        figures.append((f"{share:.2f}", "of what files of five float16 logits per cell lose of these maps"))
    named = "have a code or a tail slot" if store.meta.tail else "are in the palette"
    figures.append((f"{sums['coverage'] / rows:.1%}", f"of the probability is in classes that {named}, all"))
    if "first_kept" in sums:
        figures.append(
            (f"{sums['first_kept'] / rows:.1%}", "of cells keep the teacher’s first class as the first, all")
        )
    return figures


def palette_curve(sample: Sample) -> Markup:
    """Plots the probability of an image's 1, 2, 3 … largest palette classes, whatever their order in the store."""
    share = np.sort(sample.p.mean((2, 3)), axis=1)[:, ::-1].mean(0)
    slots = max(1, int((share > 0).sum()))
    label = "Probability kept with an image’s 1, 2, 3 … largest palette classes, mean over images"
    if sample.maps.tail_classes.shape[1]:
        label += f"; the tail has {sample.tail.mean():.1%} more"
    return curve(np.cumsum(share[:slots]).tolist(), label)


def audit_charts(audit: Audit, costs: Costs | None) -> list[Markup]:
    """Draws the errors of an audit, and the costs of other encodings."""
    rows = [
        ("storage", audit.storage),
        ("top-5 files’ storage", audit.reference),
        ("mirror, one pass", audit.mirror),
        ("mirror, to average", audit.mirror_averaged),
        *((f"crop of {float(share):.0%}", error) for share, error in audit.crop.items()),
    ]
    charts = [bars(rows, "KL in nats, means over images (storage and mirror: over cells)", ".3f")]
    return charts if costs is None else [*charts, costs.chart()]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Bytes per image and KL in nats of the same maps in several encodings.

    Attributes:
        images: Number of images that were measured.
        several: Costs of encodings, from coarse to fine.
        own: (bytes, KL) of the store: of its shards, and of the audit.
        reference: (bytes, KL) of the reference's files.
    """

    images: int
    several: tuple[Cost, ...]
    own: tuple[float, float]
    reference: tuple[float, float]

    def chart(self) -> Markup:
        """Plots KL against bytes."""
        line = [
            (c.bytes, c.kl, f"levels {c.encoding.levels}, threshold {c.encoding.threshold:g}") for c in self.several
        ]
        marks = [(*self.own, "this store"), (*self.reference, "top-5 files")]
        label = (
            f"KL to the teacher, nats, against bytes of a row, {self.images} images: encodings from coarse to fine, "
            "the store’s own, and one .pt file of five float16 logits per cell"
        )
        return scatter(line, marks, label)


def costs_of(store: LabelStore, logits: Tensor, audit: Audit, progress: bool = False) -> Costs:
    """Measures the costs of maps in encodings from below low to above high quality.

    Args:
        store: The store.
        logits: Maps [K, C, H, W].
        audit: The audit of the store.
        progress: Show a progress bar.

    Returns:
        The costs.
    """
    from tqdm import tqdm

    base = store.plan.encoding
    several = []
    for threshold in tqdm(THRESHOLDS, desc="encodings", disable=not progress):
        encoding = dataclasses.replace(
            QUALITIES["default"], palette=max(base.palette, 1), tail=store.meta.tail or QUALITIES["default"].tail,
            levels=_levels(threshold), threshold=threshold,
        )  # fmt: skip
        several.append(measure(logits, encoding))
    # As it is, since an earlier version may have written the store.
    own = sum(marker.size for marker in store.markers) / len(store), audit.storage
    reference = float(reference_bytes(store.meta.grid)), float(_reference_kl(logits))
    return Costs(len(logits), tuple(several), own, reference)


def _levels(threshold: float) -> int:
    """Interpolates the levels for a threshold between low and high quality."""
    low, high = QUALITIES["low"], QUALITIES["high"]
    way = math.log(threshold / low.threshold) / math.log(high.threshold / low.threshold)
    return round(low.levels + way * (high.levels - low.levels))


def reference_bytes(grid: tuple[int, int]) -> int:
    """Returns the bytes of a reference's file of one map: five logits and five class ids per cell, float16."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.zeros(2, 5, *grid, dtype=torch.float16), buffer)
    return len(buffer.getvalue())


def _reference_kl(logits: Tensor) -> float:
    """Returns the mean KL of the reference's files."""
    from labeler.store.encoder import reference_kl

    return float(reference_kl(logits.float()).mean())
