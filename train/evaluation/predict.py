"""`predict`: the most probable classes of single images, and where the network's own token head sees them.

Legend: B images; C classes; S input side; h×w token grid.
"""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from labeler.base.errors import InputError
from labeler.base.whole_files import replace_file
from labeler.config import LabelerConfig
from labeler.report.charts import OTHER
from labeler.sources.images import BadImage, check_header
from labeler.sources.pixels import open_rgb
from pipeline.augment.crops import center_crops
from pipeline.view import (
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
    tinted,
)
from train.evaluation.validate import Trained, load_trained
from train.ranks.distributed import joined_ranks

log = logging.getLogger("train")

BATCH = 32
PANEL, COLUMN = 288, 240  # side of a panel and width of the legend, in pixels
OPACITY = 0.6


@dataclass(frozen=True)
class ClassShare:
    id: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """classes: the most probable ones, from the first on; map: the picture, None where none was asked for."""

    image: str
    classes: tuple[ClassShare, ...]
    map: str | None

    def text(self) -> str:
        lines = [self.image, *(f"  {share.probability:7.2%}  {share.name}" for share in self.classes)]
        return "\n".join([*lines, *([f"  map: {self.map}"] if self.map else [])])


def predict(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    ema: bool | None = None,
    maps: str | Path | None = None,
    device: str = "auto",
    img_size: int | None = None,
    crop_pct: float | None = None,
    progress: bool = True,
) -> list[Prediction]:
    """The classes of image files; all of them are read before the first is classified.

    top   how many classes, from the most probable on
    img_size, crop_pct  as `load_trained`
    maps  folder for a picture of each image's tokens, tinted by the classes of the auxiliary head
    Raises InputError where an image cannot be read, or where maps are wanted of a model without that head.
    """
    if top < 1:
        raise InputError("--top must be 1 or more", got=top)
    trained = load_trained(checkpoint, ema, img_size, crop_pct)
    if maps is not None:
        _refuse_without_head(trained)
    shown = [see(Path(path), trained) for path in images]
    pictures = [None] * len(shown) if maps is None else _picture_names(Path(maps), [Path(path) for path in images])
    trained.tell_assumptions()
    found = []
    with joined_ranks(device) as ranks:
        net = trained.net.to(ranks.device)
        for start in tqdm(
            range(0, len(shown), BATCH), "images", leave=False, disable=not progress or len(shown) <= BATCH
        ):
            part = slice(start, start + BATCH)
            inputs = normalized(shown[part], trained).to(ranks.device)
            scores, tokens = _answers(net, inputs, maps is not None, trained.dtype(ranks.device))
            for i, (path, p) in enumerate(zip(images[part], scores, strict=True)):
                classes = _first(p, top, trained)
                picture = pictures[start + i]
                if picture is not None:
                    _write(picture, draw_map(shown[start + i], tokens[i], classes, Path(path).name, trained))
                found.append(Prediction(_printable(path), classes, None if picture is None else _printable(picture)))
    return found


def see(path: Path, trained: Trained) -> np.ndarray:
    """uint8 [S, S, 3]: what the network sees of an image file, resized and cropped as in the evaluation.

    Raises InputError where it is no image that can be decoded.
    """
    named = f"the image {_printable(path)!r}"
    if path.is_dir():
        raise InputError(
            f"{named} is a folder", expected="image files", remedy=f"Name those in it: {_printable(path)}/*"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{named} cannot be read", got=error.strerror) from None
    try:
        check_header(data, 1, LabelerConfig.max_pixels)
        image = open_rgb(data, trained.transform["orientation"])
    except BadImage as error:
        raise InputError(f"{named} cannot be used", got=error) from None
    except Exception as error:  # PIL's decoders raise many types
        raise InputError(f"{named} cannot be decoded", got=error) from None
    side, how = trained.side, trained.transform
    window = center_crops(np.array([[image.height, image.width]]), side, how["crop_pct"], how["crop_mode"])
    y0, x0, y1, x1 = window[0].tolist()
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1)))


def normalized(shown: Sequence[np.ndarray], trained: Trained) -> torch.Tensor:
    """float32 [B, 3, S, S]: the network's input."""
    mean, std = (torch.tensor(trained.transform[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 255 - mean) / std


def draw_map(
    shown: np.ndarray, tokens: torch.Tensor, classes: Sequence[ClassShare], name: str, trained: Trained
) -> Image.Image:
    """What the network sees beside the same with each token tinted by its most probable class, and these classes.

    shown   uint8 [S, S, 3]
    tokens  float32 [C, h, w]: probabilities of the auxiliary head
    """
    strength, first = tokens.max(0)
    cells = Cells(first.numpy(), (FAINTEST + (1 - FAINTEST) * strength).numpy())
    shares = torch.bincount(first.flatten(), minlength=len(tokens)) / first.numel()
    common = [c for c in shares.argsort(descending=True, stable=True).tolist() if shares[c] > 0]
    colours = assign_colours(common)
    image = Image.fromarray(shown).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    lefts = (MARGIN, MARGIN + PANEL + GAP, MARGIN + 2 * (PANEL + GAP))
    top = MARGIN + LINE
    page = Image.new("RGB", (lefts[2] + COLUMN + MARGIN, top + PANEL + 2 * LINE + MARGIN), PAPER)
    page.paste(image, (lefts[0], top))
    page.paste(tinted(image, cells, WHOLE, colours, OPACITY), (lefts[1], top))
    draw = ImageDraw.Draw(page)
    for left, heading in zip(lefts, ("what the network sees", "its token head", "share of the tokens"), strict=True):
        draw.text((left, MARGIN - 4), heading, SOFT, FONT)
    room = PANEL // LINE
    for i, number in enumerate([c for c in common if shares[c] > RARE][:room]):
        y = top + i * LINE
        draw.rectangle((lefts[2], y + 3, lefts[2] + SWATCH, y + 3 + SWATCH), colours.get(number, OTHER))
        text = f"{shares[number]:.0%} {trained.class_name(number)}"
        draw.text((lefts[2] + SWATCH + 6, y), _cut(draw, text, COLUMN - SWATCH - 6), INK, FONT)
    draw.text((lefts[0], top + PANEL + 6), _cut(draw, name, page.width - 2 * MARGIN), INK, FONT)
    told = "image: " + ", ".join(f"{share.name} {share.probability:.1%}" for share in classes)
    draw.text((lefts[0], top + PANEL + 6 + LINE), _cut(draw, told, page.width - 2 * MARGIN), SOFT, FONT)
    return page


def _answers(net: Any, inputs: torch.Tensor, maps: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, C] of the images and [B, C, h, w] of their tokens, where wanted; float32 on the CPU."""
    with torch.inference_mode(), torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
        logits = net(inputs)
        tokens = net.score_maps(inputs) if maps else logits[:0]
    return logits.float().softmax(1).cpu(), tokens.float().softmax(1).cpu()


def _first(probabilities: torch.Tensor, top: int, trained: Trained) -> tuple[ClassShare, ...]:
    values, numbers = probabilities.topk(min(top, len(probabilities)))
    return tuple(
        ClassShare(number, trained.class_name(number), p)
        for number, p in zip(numbers.tolist(), values.tolist(), strict=True)
    )


def _refuse_without_head(trained: Trained) -> None:
    if trained.net.aux_head is None:
        raise InputError(f"{trained.name} has no auxiliary head, so no map of its tokens", remedy="Do without --map.")
    if not trained.dense_trained:
        log.warning(
            "%s was trained without its auxiliary head (loss.dense_weight=0): --map shows an untrained head",
            trained.name,
        )


def _picture_names(folder: Path, images: Sequence[Path]) -> list[Path]:
    """A file for each image's picture, all different, and none of them one of the images."""
    taken = {path.resolve() for path in images}
    found = []
    for path in images:
        names = (f"{path.stem}{'' if n == 1 else f'-{n}'}.map.png" for n in itertools.count(1))
        chosen = next(folder / name for name in names if (folder / name).resolve() not in taken)
        taken.add(chosen.resolve())
        found.append(chosen)
    return found


def _write(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, buffer.getvalue())
    except OSError as error:
        raise InputError(f"the picture {_printable(path)!r} cannot be written", got=error.strerror) from None


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text in one line, cut to what fits into so many pixels."""
    text = _printable(" ".join(text.split()))[:200]
    if draw.textlength(text, FONT) <= width:
        return text
    while text and draw.textlength(text + "…", FONT) > width:
        text = text[:-1]
    return text + "…"


def _printable(path: str | Path) -> str:
    """A name that can be printed, also where its bytes are no text."""
    return str(path).encode("utf-8", "backslashreplace").decode()
