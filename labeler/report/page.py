"""The report on a label store: a self-contained HTML page of figures, images with their maps, and charts.

Legend: n sampled rows; P palette size; H×W map grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from labeler.audit import Audit, audit_labels
from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from labeler.relabel import refuse_foreign_teacher
from labeler.report.charts import COLOURS, OTHER, bars, heat_grid, histogram, lay_over, picture
from labeler.report.figures import Sample, TruthCheck, check_truth, draw_sample
from labeler.report.truth import Costs, audit_part, cards, costs_of, missing_note, palette_curve
from labeler.sources.image_source import BadImage, ImageSource
from labeler.sources.open_source import open_images
from labeler.store.label_store import LabelStore

PICTURES = 24
PICTURE_SIDE = 170
LEGEND = 4  # classes with a color in one map
QUARANTINE_SHOWN = 200

STYLE = Path(__file__).with_name("report.css").read_text("utf-8")


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
        store: The store's folder.
        images: The image root that was labeled.
        out: The page to write.
        truth: Folder of PNGs of class ids, named by key; None: no comparison.
        sample: Number of random rows for the charts.
        title: Heading of the page.
        seed: Seed of the random rows.
        audit: Run the store's teacher again on this many images, see `labeler.audit`.
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
        refuse_foreign_teacher(labels.trusted, labels.plan, labels.path, "--audit")
    drawn = draw_sample(labels, sample, seed)
    source = open_images(images, drawn.keys)
    missing = len(source.problems)
    if missing == len(drawn.keys) and len(open_images(images, labels.keys).problems) == len(labels):
        raise InputError(
            f"none of the store's images is below {str(images)!r}", got=f"0 of {len(labels):,}",
            expected=f"for example {drawn.keys[0]!r}", remedy="Give --images the folder that was labeled.",
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
    meta, truth = store.meta, findings.truth
    grid = "×".join(map(str, meta.grid))
    teacher = meta.teacher
    tail = f" and {meta.tail} more in a tail" if meta.tail else ""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{len(store):,} images, maps of {grid} cells over {meta.num_classes:,} classes, at most '
        f"{meta.palette} of them with a plane of scores per image{tail}, by <b>{escape(str(teacher['name']))}</b>. "
        "Charts are drawn from "
        f"{len(sample.rows):,} random rows; figures marked “all” are from every row.</p>",
        missing_note(findings.missing, findings.sampled, images.name),
        cards(store, sample, truth),
        *(f'<p class="note">{escape(note)}</p>' for note in teacher.get("notes", ())),
        "<h2>What the teacher sees, and where</h2>",
        '<p class="soft">Left: the image. Right: its stored map, each cell in the color of its most probable class, '
        "stronger if more probable; gray if the class is not named below. Percentages are shares of the whole "
        "map’s probability.</p>",
        f'<div class="maps">{_maps(store, sample, images)}</div>',
        _truth_part(truth),
        audit_part(store, findings.audit, costs),
        "<h2>What the labels contain</h2>",
        f'<div class="charts">{_charts(store, sample)}</div>',
        _agreement(store, sample),
        _quarantine(store),
        _settings(store),
    ]
    body = "\n".join(part for part in parts if part)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head = f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head>'
    return f"{head}<body><main>{body}</main></body></html>\n"


def class_name(store: LabelStore, number: int) -> str:
    """Returns the name of a class, or "class N"."""
    names = store.meta.class_names
    return names[number] if 0 <= number < len(names) else f"class {number}"


def _maps(store: LabelStore, sample: Sample, images: ImageSource) -> str:
    """Returns the images with their maps."""
    from labeler.sources.decoding.pixels import open_rgb

    chosen = np.random.default_rng(1).permutation(len(sample.rows))[:PICTURES]
    parts = []
    for i in sorted(chosen.tolist()):
        try:
            image = open_rgb(images.read(images.keys.index(sample.keys[i])), store.meta.orientation)
        except (BadImage, OSError, ValueError) as error:
            parts.append(
                f'<div class="map"><div class="name">{escape(sample.keys[i])}: {escape(str(error))}</div></div>'
            )
            continue
        scale = PICTURE_SIDE / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        parts.append(_one_map(store, sample, i, image))
    return "".join(parts)


def _one_map(store: LabelStore, sample: Sample, i: int, image: object) -> str:
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
        legend.append(
            f'<span><i style="background:rgb{colour}"></i>{escape(class_name(store, number))} '
            f"{'&lt;1' if percent < 1 else round(percent)}%</span>"
        )
    if len(names) > len(largest):
        legend.append(f'<span><i style="background:rgb{OTHER}"></i>{len(names) - len(largest)} more</span>')
    overlay = lay_over(image, colours, 0.15 + 0.75 * sample.confidence[i], sample.maps.region[i])
    target = int(sample.target[i])
    label = f" · labeled <b>{escape(class_name(store, target))}</b>" if target >= 0 else ""
    return (
        f'<div class="map"><div class="pair">{picture(image)}{picture(overlay)}</div>'
        f'<div class="legend">{"".join(legend)}</div>'
        f'<div class="name">{escape(sample.keys[i])}{label}</div></div>'
    )


def _charts(store: LabelStore, sample: Sample) -> str:
    """Returns the charts of the sample."""
    meta = store.meta
    kept = "codes and tail cover" if meta.tail else "the palette covers"
    charts = [
        histogram(store.row_bytes(sample.rows), "Bytes of score planes per image, as compressed"),
        palette_curve(sample),
        histogram(1 - sample.left.mean((1, 2)), f"Probability that {kept}, per image", top=1.0, percent=True),
        histogram(sample.entropy, f"Entropy of each cell, nats (uniform over {meta.num_classes:,} classes: "
                  f"{np.log(meta.num_classes):.2f})", top=float(np.log(meta.num_classes))),
        histogram(sample.confidence, "Probability of each cell’s first class", top=1.0, percent=True),
        bars(_common_classes(store, sample), "Share of cells by their first class, the most common classes"),
    ]  # fmt: skip
    return "".join(charts)


def _common_classes(store: LabelStore, sample: Sample) -> list[tuple[str, float]]:
    """Returns (name, share of cells) of the most common first classes."""
    numbers, counts = np.unique(sample.top1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:10]
    return [(class_name(store, int(numbers[i])), float(counts[i] / counts.sum())) for i in order]


def _truth_part(truth: TruthCheck | None) -> str:
    """Returns the comparison with true maps."""
    if truth is None:
        return ""
    heat = heat_grid(truth.by_cell, "Accuracy by position in the map (green: all right, red: none)")
    turned = "" if truth.transposed is None else f", and when transposed, {truth.transposed:.1%}"
    return (
        "<h2>Is the right class in the right place?</h2>"
        f'<p class="soft">The true class of every pixel is known for {truth.images:,} of the sampled images. Of the '
        f"{truth.cells:,} cells that are more than half covered by one object, the stored map has its class in "
        f"<b>{truth.right:.1%}</b>. For comparison, the same maps score, when mirrored, {truth.mirrored:.1%}"
        f"{turned}. "
        "A misplaced map would be obvious here.</p>"
        f'<div class="charts">{heat}</div>'
    )


def _agreement(store: LabelStore, sample: Sample) -> str:
    """Returns the comparison with the folders' classes."""
    known = sample.target >= 0
    if not known.any():
        return ""
    predicted, target = sample.image_class[known], sample.target[known]
    wrong: dict[tuple[int, int], int] = {}
    for pair in zip(target.tolist(), predicted.tolist(), strict=True):
        if pair[0] != pair[1]:
            wrong[pair] = wrong.get(pair, 0) + 1
    rows = "".join(
        f"<tr><td>{escape(class_name(store, a))}</td><td>{escape(class_name(store, b))}</td>"
        f"<td class='n'>{count}</td></tr>"
        for (a, b), count in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:12]
    )
    table = (
        f"<table><tr><th>folder says</th><th>map says</th><th class='n'>images</th></tr>{rows}</table>" if rows else ""
    )
    return (
        "<h2>Agreement with the folders</h2>"
        f'<p class="soft">The class with the largest share of the map is the folder’s in '
        f"<b>{(predicted == target).mean():.1%}</b> of {len(predicted):,} sampled images. The most frequent "
        f"differences:</p>{table}"
    )


def _quarantine(store: LabelStore) -> str:
    """Returns the list of images that could not be labeled."""
    entries = store.quarantine
    if not entries:
        return '<h2>Quarantine</h2><p class="soft">Empty: every image has labels.</p>'
    rows = "".join(
        f"<tr><td><code>{escape(e['key'])}</code></td><td>{escape(e['reason'])}</td></tr>"
        for e in entries[:QUARANTINE_SHOWN]
    )
    more = f'<p class="soft">… and {len(entries) - QUARANTINE_SHOWN:,} more, see quarantine.jsonl</p>'
    return (
        f"<h2>Quarantine</h2><p class='soft'>{len(entries):,} images could not be labeled and have no row.</p>"
        f"<table>{rows}</table>{more if len(entries) > QUARANTINE_SHOWN else ''}"
    )


def _settings(store: LabelStore) -> str:
    """Returns the table of settings."""
    meta, plan = store.meta, store.plan
    facts: dict[str, object] = {f"teacher: {name}": value for name, value in meta.teacher.items() if name != "notes"}
    facts |= {f"setting: {name}": value for name, value in plan.settings.items()}
    facts |= {
        "shards": f"{meta.shards} of at most {plan.shard_size} images",
        "scores": f"{meta.score_kind}, {meta.precision}",
        "image orientation": meta.orientation,
        "data-set fingerprint": meta.dataset_fingerprint,
        "store fingerprint": store.fingerprint,
        "format": f"{meta.format} {meta.format_version}, written by {meta.writer}",
    }
    rows = "".join(f"<tr><th>{escape(k)}</th><td><code>{escape(str(v))}</code></td></tr>" for k, v in facts.items())
    return f"<h2>Settings</h2><table>{rows}</table>"
