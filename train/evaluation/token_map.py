"""Pictures of the token head's classes for single images, and the files that they are written to.

Legend: C classes; S input side; h×w token grid.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from labeler.report.charts import OTHER
from pipeline.batch_picture import (
    FAINTEST,
    FONT,
    GAP,
    INK,
    LINE,
    MARGIN,
    PAPER,
    RARE,
    SOFT,
    SWATCH,
    WHOLE,
    Cells,
    assign_colours,
    draw_caption,
    tinted,
)
from train.evaluation.single_images import ClassShare, ImageFile, printable
from train.evaluation.validate import Trained

PANEL, COLUMN = 288, 240  # side of a panel and width of the legend, in pixels
OPACITY = 0.6


def draw_map(
    pixels: np.ndarray, tokens: torch.Tensor, classes: Sequence[ClassShare], name: str, trained: Trained
) -> Image.Image:
    """Draw the network's input, beside it the same with each token tinted by its most probable class, and a legend.

    Args:
        pixels: the network's input before normalization, uint8 [S, S, 3].
        tokens: probabilities of the auxiliary head, float32 [C, h, w].
        classes: the most probable classes of the image.
        name: the image's name.
        trained: the model, for its class names.

    Returns:
        The picture.
    """
    strength, first = tokens.max(0)
    cells = Cells(first.numpy(), (FAINTEST + (1 - FAINTEST) * strength).numpy())
    shares = torch.bincount(first.flatten(), minlength=len(tokens)) / first.numel()
    common = [c for c in shares.argsort(descending=True, stable=True).tolist() if shares[c] > 0]
    colors = assign_colours(common)
    image = Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    lefts = (MARGIN, MARGIN + PANEL + GAP, MARGIN + 2 * (PANEL + GAP))
    top = MARGIN + LINE
    page = Image.new("RGB", (lefts[2] + COLUMN + MARGIN, top + PANEL + 3 * LINE + MARGIN), PAPER)
    page.paste(image, (lefts[0], top))
    page.paste(tinted(image, cells, WHOLE, colors, OPACITY), (lefts[1], top))
    draw = ImageDraw.Draw(page)
    for left, heading in zip(lefts, ("what the network sees", "its token head", "share of the tokens"), strict=True):
        draw.text((left, MARGIN - 4), heading, SOFT, FONT)
    named = [c for c in common if shares[c] > RARE][: PANEL // LINE - 1]
    for i, number in enumerate(named):
        y = top + i * LINE
        draw.rectangle((lefts[2], y + 3, lefts[2] + SWATCH, y + 3 + SWATCH), colors.get(number, OTHER))
        text = f"{shares[number]:.0%} {trained.aux_class_name(number)}"
        draw.text((lefts[2] + SWATCH + 6, y), _cut(draw, text, COLUMN - SWATCH - 6), INK, FONT)
    if len(common) > len(named):
        draw.text((lefts[2], top + len(named) * LINE), f"and {len(common) - len(named)} more classes", SOFT, FONT)
    draw.text((lefts[0], top + PANEL + 6), _cut(draw, name, page.width - 2 * MARGIN), INK, FONT)
    text = "image: " + ", ".join(f"{share.name} {share.probability:.1%}" for share in classes)
    draw.text((lefts[0], top + PANEL + 6 + LINE), _cut(draw, text, page.width - 2 * MARGIN), SOFT, FONT)
    draw_caption(page, lefts[0], top + PANEL + 6 + 2 * LINE, "token", OPACITY, len(common) > len(colors))
    return page


def picture_names(folder: Path, images: Sequence[ImageFile], suffix: str = ".map.png") -> Iterator[Path]:
    """Choose a file for each image's picture, all different, and none of them one of the images.

    Args:
        folder: folder for the pictures; below it they are arranged as the images in the folder that was searched.
        images: the images.
        suffix: what is put in place of the image's own suffix.

    Returns:
        An iterator over the files, in the order of the images.

    Raises:
        InputError: `folder` is below a folder of images: the next run would take the pictures for images.
    """
    target = folder.resolve()
    for searched in {image.folder for image in images} - {""}:
        if target.is_relative_to(Path(searched).resolve()):
            raise InputError(
                "pictures would be written among the images",
                got=f"{printable(folder)!r} below {printable(searched)!r}",
                remedy="Choose an `out` elsewhere: the next run would take the pictures for images.",
            )  # fmt: skip
    return _names(folder, images, suffix)


def _names(folder: Path, images: Sequence[ImageFile], suffix: str) -> Iterator[Path]:
    taken = {os.path.realpath(image.path) for image in images if not image.folder}
    for image in images:
        key = Path(image.key)
        below = folder / key.parent if image.folder else folder
        names = (f"{key.stem}{'' if n == 1 else f'-{n}'}{suffix}" for n in itertools.count(1))
        chosen = next(below / name for name in names if os.path.realpath(below / name) not in taken)
        taken.add(os.path.realpath(chosen))
        yield chosen


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG. Raises InputError if that is impossible."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, buffer.getvalue())
    except OSError as error:
        raise InputError(f"the picture {printable(path)!r} cannot be written", got=error.strerror) from None


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text in one line, cut to what fits into so many pixels."""
    text = printable(" ".join(text.split()))[:200]
    if draw.textlength(text, FONT) <= width:
        return text
    while text and draw.textlength(text + "…", FONT) > width:
        text = text[:-1]
    return text + "…"
