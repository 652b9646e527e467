"""The report on a label store: a self-contained HTML page of figures, images with their maps, and charts.

Legend: n sampled rows; P palette size; H×W map grid.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from labeler.checks.audit import Audit, audit_labels
from labeler.checks.relabel import refuse_foreign_teacher
from labeler.report.charts import COLOURS, OTHER, bars, heat_grid, histogram, lay_over, picture
from labeler.report.figures import Sample, TruthCheck, check_truth, draw_sample
from labeler.report.template import fill
from labeler.report.truth import Costs, audit_charts, cards, costs_of, palette_curve
from labeler.sources.image_source import BadImage, ImageSource
from labeler.sources.open_source import open_images
from labeler.store.label_store import LabelStore

PICTURES = 24
PICTURE_SIDE = 170
LEGEND = 4  # classes with a color in one map
DIFFERENCES = 12  # pairs of a folder's class and a map's
QUARANTINE_SHOWN = 200


@dataclass(frozen=True)
class Findings:
    """The results of a report's comparisons.

    Attributes:
        truth: Comparison with true maps; None if not requested.
        audit: Errors of the labels; None if not requested.
        sampled: Number of sampled images.
        missing: Number of these that were not found.
    """

    truth: TruthCheck | None
    audit: Audit | None
    sampled: int
    missing: int


@dataclass(frozen=True)
class Map:
    """An image of the page and its map.

    Attributes:
        key: The image's key.
        image: The image as an <img> tag.
        overlay: The same with its map.
        legend: (color, text) of the classes that have a color, then of the others.
        folder: The class of its folder; "" if unknown.
        error: Why it cannot be shown; "" if it can.
    """

    key: str
    image: str = ""
    overlay: str = ""
    legend: tuple[tuple[tuple[int, int, int], str], ...] = ()
    folder: str = ""
    error: str = ""


def write_report(
    store: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    truth: str | Path | None = None,
    sample: int = 500,
    title: str | None = None,
    seed: int = 0,
    audit: int = 0,
    device: str = "auto",
    trusted: bool = False,
    progress: bool = False,
) -> Findings:
    """Writes the report on a store.

    Args:
        store: The store's folder, or its URL.
        images: The image root that was labeled.
        out: The page to write.
        truth: Folder of PNGs of class ids, named by key; None: no comparison.
        sample: Number of random rows for the charts.
        title: Heading of the page.
        seed: Seed of the random rows.
        audit: Run the store's teacher again on this many images, see `labeler.checks.audit`.
        device: Device of the teacher.
        trusted: Trust this store, so that its teacher may be run.
        progress: Show a progress bar.

    Returns:
        The results of its comparisons.

    Raises:
        InputError: The store, the images or the truth cannot be read, none of the store's images is found, or the page
            cannot be written.
    """
    labels = LabelStore(store, trusted=trusted)
    if not len(labels):
        raise InputError(f"{str(store)!r} has no rows", remedy="See its quarantine.jsonl.")
    if audit:
        refuse_foreign_teacher(labels.trusted, labels.plan, labels.path, "`audit`")
    drawn = draw_sample(labels, sample, seed)
    source = open_images(images, drawn.keys)
    missing = len(source.problems)
    if missing == len(drawn.keys) and len(open_images(images, labels.keys).problems) == len(labels):
        raise InputError(
            f"none of the store's images is below {str(images)!r}", got=f"0 of {len(labels):,}",
            expected=f"for example {drawn.keys[0]!r}", remedy="Set `images` to the folder that was labeled.",
        )  # fmt: skip
    checked = None if truth is None else check_truth(drawn, Path(truth))
    result, costs = None, None
    if audit:
        result, logits = audit_labels(labels, images, audit, device=device, seed=seed, progress=progress)
        costs = costs_of(labels, logits, result, progress)
    findings = Findings(checked, result, len(drawn.keys), missing)
    page = render(labels, drawn, source, findings, costs, title or f"Label store {Path(store).name}")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(out), page.encode())
    except OSError as error:
        raise InputError(f"the report {str(out)!r} cannot be written", got=error.strerror) from None
    return findings


def render(
    store: LabelStore, sample: Sample, images: ImageSource, findings: Findings, costs: Costs | None, title: str
) -> str:
    """Returns the whole page as HTML."""
    truth, audit = findings.truth, findings.audit
    label = "Accuracy by position in the map (green: all right, red: none)"
    return fill(
        "page.html",
        title=title,
        store=store,
        meta=store.meta,
        images=images.name,
        findings=findings,
        cards=cards(store, sample, truth),
        maps=_maps(store, sample, images),
        heat=None if truth is None else heat_grid(truth.by_cell, label),
        audit_charts=None if audit is None else audit_charts(audit, costs),
        charts=_charts(store, sample),
        agreement=_agreement(store, sample),
        quarantine_shown=QUARANTINE_SHOWN,
        settings=_settings(store),
    )


def class_name(store: LabelStore, number: int) -> str:
    """Returns the name of a class, or "class N"."""
    names = store.meta.class_names
    return names[number] if 0 <= number < len(names) else f"class {number}"


def _maps(store: LabelStore, sample: Sample, images: ImageSource) -> list[Map]:
    """Returns the images with their maps."""
    from labeler.sources.decoding.pixels import open_rgb

    chosen = np.random.default_rng(1).permutation(len(sample.rows))[:PICTURES]
    maps = []
    for i in sorted(chosen.tolist()):
        try:
            image = open_rgb(images.read(images.keys.index(sample.keys[i])), store.meta.orientation)
        except (BadImage, OSError, ValueError) as error:
            maps.append(Map(sample.keys[i], error=str(error)))
            continue
        scale = PICTURE_SIDE / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        maps.append(_one_map(store, sample, i, image))
    return maps


def _one_map(store: LabelStore, sample: Sample, i: int, image: object) -> Map:
    """Returns one image with its map and legend."""
    names, counts = np.unique(sample.top1[i], return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")[:LEGEND]].tolist()
    classes, share = (column[i] for column in sample.named)
    few = store.meta.num_classes <= len(COLOURS)
    colours = np.full((*sample.top1.shape[1:], 3), OTHER, np.uint8)
    legend = []
    for order, number in enumerate(largest):
        colour = COLOURS[number if few else order]
        colours[sample.top1[i] == number] = colour
        percent = 100 * share[classes == number].sum()
        legend.append((colour, f"{class_name(store, number)} {'<1' if percent < 1 else round(percent)}%"))
    if len(names) > len(largest):
        legend.append((OTHER, f"{len(names) - len(largest)} more"))
    overlay = lay_over(image, colours, 0.15 + 0.75 * sample.confidence[i], sample.maps.region[i])
    target = int(sample.target[i])
    folder = class_name(store, target) if target >= 0 else ""
    return Map(sample.keys[i], picture(image), picture(overlay), tuple(legend), folder)


def _charts(store: LabelStore, sample: Sample) -> list[Markup]:
    """Returns the charts of the sample."""
    meta = store.meta
    kept = "codes and tail cover" if meta.tail else "the palette covers"
    return [
        histogram(store.row_bytes(sample.rows), "Bytes of score planes per image, as compressed"),
        palette_curve(sample),
        histogram(1 - sample.left.mean((1, 2)), f"Probability that {kept}, per image", top=1.0, percent=True),
        histogram(sample.entropy, f"Entropy of each cell, nats (uniform over {meta.num_classes:,} classes: "
                  f"{np.log(meta.num_classes):.2f})", top=float(np.log(meta.num_classes))),
        histogram(sample.confidence, "Probability of each cell’s first class", top=1.0, percent=True),
        bars(_common_classes(store, sample), "Share of cells by their first class, the most common classes"),
    ]  # fmt: skip


def _common_classes(store: LabelStore, sample: Sample) -> list[tuple[str, float]]:
    """Returns (name, share of cells) of the most common first classes."""
    numbers, counts = np.unique(sample.top1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:10]
    return [(class_name(store, int(numbers[i])), float(counts[i] / counts.sum())) for i in order]


def _agreement(store: LabelStore, sample: Sample) -> dict[str, object] | None:
    """Returns the comparison with the folders' classes; None if no class is known."""
    known = sample.target >= 0
    if not known.any():
        return None
    predicted, target = sample.image_class[known], sample.target[known]
    pairs = Counter(pair for pair in zip(target.tolist(), predicted.tolist(), strict=True) if pair[0] != pair[1])
    wrong = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:DIFFERENCES]
    return {
        "share": (predicted == target).mean(),
        "images": len(predicted),
        "wrong": [(class_name(store, a), class_name(store, b), count) for (a, b), count in wrong],
    }


def _settings(store: LabelStore) -> dict[str, object]:
    """Returns the settings by name."""
    meta, plan = store.meta, store.plan
    parts = f", in {len(store.parts)} parts" if len(store.parts) > 1 else ""
    return {
        **{f"teacher: {name}": value for name, value in meta.teacher.items() if name != "notes"},
        **{f"setting: {name}": value for name, value in plan.settings.items()},
        "shards": f"{meta.shards} of at most {plan.shard_size} images" + parts,
        "scores": f"{meta.score_kind}, score precision {meta.precision}",
        "image orientation": meta.orientation,
        "data-set fingerprint": meta.dataset_fingerprint,
        "store fingerprint": store.fingerprint,
        "format": f"{meta.format} {meta.format_version}, written by {meta.writer}",
    }
