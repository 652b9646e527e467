"""The part of the report that says how true the labels are: figures of every row, and what an audit found.

Legend: K images whose maps the audit kept; C classes; H×W map grid.
"""

from __future__ import annotations

import dataclasses
import io
import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from labeler.audit import Audit
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
    """What the markers sum up over every row; only what all of them have."""
    return {
        name: sum(marker.stats[name] for marker in store.markers)
        for name in STATS
        if all(name in marker.stats for marker in store.markers)
    }


def cards(store: LabelStore, sample: Sample, truth: TruthCheck | None) -> str:
    """The figures at the head of the page."""
    rows, found = max(1, len(store)), totals(store)
    size = sum(file.stat().st_size for file in store.path.iterdir())
    shown = [(f"{size / rows:,.0f} B", "per image, all files of the store counted"), *truth_cards(store)]
    if truth is not None:
        shown.append((f"{truth.right:.1%}", f"of {truth.cells:,} object cells name the right class in the right place"))
    if found.get("known"):
        shown.append((f"{found['agree'] / found['known']:.1%}", "of images: the map’s class is the folder’s, all"))
    shown += [
        (f"{np.median(sample.confidence):.0%}", "median probability of a cell’s first class"),
        (f"{len(store.quarantine):,}", "images in the quarantine"),
    ]
    return f'<div class="cards">{"".join(f"<div class=card><b>{a}</b><span>{b}</span></div>" for a, b in shown)}</div>'


def truth_cards(store: LabelStore) -> list[tuple[str, str]]:
    """Figures of every row as (figure, what it is); none for an imported store, which does not know its teacher."""
    found, rows = totals(store), max(1, len(store))
    if store.meta.score_kind != "logprob" or not {"kl", "coverage"} <= found.keys():
        return []
    shown = [(f"{found['kl'] / rows:.4f}", "nats lost per cell: KL from the teacher’s full softmax to the store, all")]
    share = share_of_reference(found.get("compared_kl", 0.0), found.get("reference_kl", 0.0), rows)
    if share is not None:
        shown.append((f"{share:.2f}", "of what files of five float16 logits per cell lose of these maps"))
    named = "codes and the tail name" if store.meta.tail else "the palette names"
    shown.append((f"{found['coverage'] / rows:.1%}", f"of the probability is of classes that {named}, all"))
    if "first_kept" in found:
        shown.append((f"{found['first_kept'] / rows:.1%}", "of cells keep the teacher’s first class as the first, all"))
    return shown


def palette_curve(sample: Sample) -> str:
    """The probability that an image's 1, 2, 3 … largest palette classes hold, whatever their order in the store."""
    share = np.sort(sample.p.mean((2, 3)), axis=1)[:, ::-1].mean(0)
    places = max(1, int((share > 0).sum()))
    label = "Probability kept with an image’s 1, 2, 3 … largest palette classes, mean over images"
    if sample.maps.tail_classes.shape[1]:
        label += f"; the tail names {sample.tail.mean():.1%} more"
    return curve(np.cumsum(share[:places]).tolist(), label)


def audit_part(store: LabelStore, audit: Audit | None, costs: Costs | None) -> str:
    """The heading, three sentences and two charts of an audit; a line on how to get one where there was none."""
    if audit is None:
        if store.meta.score_kind != "logprob":
            return ""
        return (
            '<p class="soft">How far the maps are from what the teacher says of mirrored pictures and of crops, and '
            "what more bytes would buy: <code>report --audit 48</code> runs the teacher again and adds it here.</p>"
        )
    missing = f" ({audit.missing:,} more were not found, or have changed)" if audit.missing else ""
    advice = audit.advice()
    less = audit.storage_of_reference
    shares = ", ".join(f"{error:.2f} at {float(share):.0%}" for share, error in audit.crop.items())
    sentences = (
        f"<b>Storage, {audit.storage:.3f} nats.</b> What the store keeps of a map differs from the map by this much in "
        f"the mean cell, {less:.2f} of what files of five float16 logits per cell lose: {advice['storage']}.",
        f"<b>Mirror, {audit.mirror:.3f} nats.</b> A mirrored picture shows the same things, yet one pass over it says "
        f"something else by this much; one pass lies {audit.mirror_averaged:.3f} from the average of both: "
        f"{advice['mirror']}.",
        f"<b>Crop, {shares} of the sides.</b> Asked about a crop alone, enlarged to its input, the teacher says "
        f"something else by this much than its stored map does of that part of the picture: {advice['crop']}.",
    )
    rows = [
        ("storage", audit.storage),
        ("top-5 files’ storage", audit.reference),
        ("mirror, one pass", audit.mirror),
        ("mirror, to average", audit.mirror_averaged),
        *((f"crop of {float(share):.0%}", error) for share, error in audit.crop.items()),
    ]
    charts = [bars(rows, "KL in nats, means over images (storage and mirror: over cells)", ".3f")]
    if costs is not None:
        charts.append(costs.chart())
    return (
        f'<h2>How true the labels are</h2><p class="soft">The teacher was run again on {audit.images:,} random '
        f"images{missing}, mirrored ones and random crops of them.</p>"
        f"<ul>{''.join(f'<li>{sentence}</li>' for sentence in sentences)}</ul>"
        f'<div class="charts">{"".join(charts)}</div>'
    )


@dataclasses.dataclass(frozen=True)
class Costs:
    """Bytes per image and KL in nats of the same maps in several encodings, in the store's own, and in the reference's.

    images  that were measured; the store's own bytes are those of its shards, and its KL the audit's
    """

    images: int
    several: tuple[Cost, ...]
    own: tuple[float, float]
    reference: tuple[float, float]

    def chart(self) -> str:
        """KL against bytes."""
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
    """What maps [K, C, H, W] cost in encodings between low and high quality, and beyond."""
    from tqdm import tqdm

    base = store.plan.encoding
    several = []
    for threshold in tqdm(THRESHOLDS, desc="encodings", disable=not progress):
        encoding = dataclasses.replace(
            QUALITIES["default"], palette=max(base.palette, 1), tail=store.meta.tail or QUALITIES["default"].tail,
            levels=_levels(threshold), threshold=threshold,
        )  # fmt: skip
        several.append(measure(logits, encoding))
    # As it is: the store may have been coded by an earlier version.
    own = sum(marker.size for marker in store.markers) / len(store), audit.storage
    reference = float(reference_bytes(store.meta.grid)), float(_reference_kl(logits))
    return Costs(len(logits), tuple(several), own, reference)


def _levels(threshold: float) -> int:
    """Levels that go with a threshold, on the line through the low and the high quality."""
    low, high = QUALITIES["low"], QUALITIES["high"]
    way = math.log(threshold / low.threshold) / math.log(high.threshold / low.threshold)
    return round(low.levels + way * (high.levels - low.levels))


def reference_bytes(grid: tuple[int, int]) -> int:
    """Bytes of the reference's file of one map: five logits and five class ids per cell, float16."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.zeros(2, 5, *grid, dtype=torch.float16), buffer)
    return len(buffer.getvalue())


def _reference_kl(logits: Tensor) -> float:
    from labeler.store.encoder import reference_kl

    return float(reference_kl(logits.float()).mean())


def missing_note(missing: int, sampled: int, images: object) -> str:
    """A line where images of the sample are not below the folder that was given."""
    if not missing:
        return ""
    text = f"{missing:,} of the {sampled:,} sampled images were not found below {images}. Was that folder labeled?"
    return f'<p class="note">{escape(text)}</p>'
