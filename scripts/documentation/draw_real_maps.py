"""Photographs above their label maps as one picture for the README, docs/real-maps.jpg.

    python -m labeler label PHOTOS --store labels --teacher scripts.efficientnet_lite:lite2 --input-size 448
    python -m scripts.documentation.draw_real_maps PHOTOS labels --out docs/real-maps.jpg

Each cell has the color of its most probable class, the stronger the more probable; the legend has its maximum.

Legend: C classes; H×W map grid.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from labeler import LabelStore
from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from labeler.report.charts import COLOURS, OTHER, lay_over
from labeler.sources.class_names import IMAGENET_CLASSES, imagenet_names
from labeler.sources.decoding.pixels import open_rgb
from labeler.sources.image_list import image_path

# Pixels. A README shows the picture at half its width, so everything is twice as large as it looks.
WIDTH, MARGIN, GAP = 1720, 20, 16
TALLEST, SHORTEST = 500, 100  # of a photograph
TEXT, LINE, SWATCH, PAD = 22, 32, 20, 10
LEGEND = 4  # classes told apart on one photograph
APART = (0, 1, 2, 7)  # of COLOURS: those that differ most where the tint is weak
FAINT = 0.1  # a class that is nowhere surer is not named
MAX_PHOTOGRAPHS = 8
MOST_BYTES = 250_000


def draw(photos: Path, store: LabelStore, keys: Sequence[str]) -> Image.Image:
    """One row of photographs of equal height, below each its map, below that its legend.

    Raises:
        InputError: where a photograph has no labels or cannot be read.
    """
    names = _class_names(store)
    try:
        maps = store.read([store.row_of(key) for key in keys])
        images = [open_rgb(image_path(photos, key).read_bytes(), store.meta.orientation) for key in keys]
    except KeyError as error:
        raise InputError(error.args[0]) from None
    except (OSError, ValueError) as error:
        raise InputError(f"a photograph below {str(photos)!r} cannot be read", got=str(error)) from None
    tinted = [tints(p) for p in maps.dense()]
    # matplotlib brings the font along, so the picture is the same on every machine.
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT)
    legends = [[f"{names[number]} {sure:.0%}" for number, sure in shown] for _, _, shown in tinted]
    widest = [int(max(map(font.getlength, lines), default=0)) + SWATCH + PAD for lines in legends]
    # As high as fits, where a column is as wide as its photograph and its legend need; long names may widen the page.
    for height in range(TALLEST, SHORTEST - 1, -1):
        pictures = [round(height * image.width / image.height) for image in images]
        columns = [max(both) for both in zip(pictures, widest, strict=True)]
        width = sum(columns) + GAP * (len(keys) - 1) + 2 * MARGIN
        if width <= WIDTH:
            break

    below = MARGIN + 2 * height + GAP // 2 + GAP
    page = Image.new("RGB", (width, below + LINE * max(map(len, legends)) + MARGIN - (LINE - SWATCH)), "white")
    pen = ImageDraw.Draw(page)
    left = MARGIN
    for i, image in enumerate(images):
        colours, strength, _ = tinted[i]
        small = image.resize((pictures[i], height), Image.Resampling.LANCZOS)
        page.paste(small, (left, MARGIN))
        page.paste(lay_over(small, colours, strength, maps.region[i]), (left, MARGIN + height + GAP // 2))
        for order, line in enumerate(legends[i]):
            y = below + LINE * order
            pen.rectangle((left, y, left + SWATCH, y + SWATCH), fill=COLOURS[APART[order]])
            pen.text((left + SWATCH + PAD, y + SWATCH / 2), line, "black", font, anchor="lm")
        left += columns[i] + GAP
    return page


def tints(p: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[int, float]]]:
    """The tints of a map p [C, H, W]: colors uint8 [H, W, 3], strengths [H, W], and the classes that have a color.

    Each class comes with its probability in its surest cell. They are those that hold the most probability in cells
    where they come first, the largest first; cells of other classes are grey.
    """
    first, sure = p.argmax(0), p.max(0)
    held = np.bincount(first.ravel(), sure.ravel(), minlength=len(p))
    order_of_size = np.argsort(-held, kind="stable").tolist()
    shown = [number for number in order_of_size if sure[first == number].max(initial=0) > FAINT][:LEGEND]
    colours = np.full((*first.shape, 3), OTHER, np.uint8)
    for order, number in enumerate(shown):
        colours[first == number] = COLOURS[APART[order]]
    # The root: a class at 30 % is to be seen, too.
    return colours, 0.85 * np.sqrt(sure), [(number, float(p[number].max())) for number in shown]


def _class_names(store: LabelStore) -> Sequence[str]:
    if store.meta.class_names:
        return store.meta.class_names
    count = store.meta.num_classes
    return imagenet_names()[1] if count == IMAGENET_CLASSES else [f"class {i}" for i in range(count)]


def _jpeg(page: Image.Image) -> bytes:
    """The picture as JPEG of at most MOST_BYTES, in the best quality that fits; text needs no chroma subsampling."""
    for quality in range(92, 40, -4):
        file = io.BytesIO()
        page.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
        if file.tell() <= MOST_BYTES:
            break
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.documentation.draw_real_maps", description=__doc__.splitlines()[0]
    )
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument("store", type=Path, help="label store of the photographs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "real-maps.jpg")
    parser.add_argument(
        "--keys", nargs="+", metavar="KEY", help="photographs to draw, from left to right (default: all)"
    )
    options = parser.parse_args(arguments)
    try:
        store = LabelStore(options.store)
        keys = options.keys or store.keys
        if not 0 < len(keys) <= MAX_PHOTOGRAPHS:
            raise InputError(
                "too many photographs for one row" if keys else "the store has no rows", got=len(keys),
                expected=f"1 to {MAX_PHOTOGRAPHS}", remedy="Choose some with --keys.",
            )  # fmt: skip
        page = draw(options.photos, store, keys)
        try:
            replace_file(options.out, _jpeg(page))
        except OSError as error:
            raise InputError(f"{str(options.out)!r} cannot be written", got=error.strerror) from None
    except InputError as error:
        parser.exit(error.exit_status, f"error: {error}\n")
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
