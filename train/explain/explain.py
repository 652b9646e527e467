"""`explain`: pages about what a trained network does inside with images.

Legend: S input side.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labeler.base.errors import InputError, ModelError
from labeler.base.whole_files import replace_file
from labeler.sources.image_source import BadImage
from model.inside.look import Inside, look_inside
from model.inside.sites import sites_of
from train.evaluation.single_images import ClassShare, ImageFile, list_images, load_image, normalized, printable
from train.evaluation.token_map import picture_names
from train.evaluation.validate import Trained, load_trained
from train.explain.page import layer_numbers, page_of, sheets_of
from train.ranks.distributed import joined_ranks

log = logging.getLogger("train")
TOP = 5  # classes on a page
PAGE = ".html"


@dataclass(frozen=True)
class Explanation:
    """What was written about an image.

    Attributes:
        image: the image's path.
        page: path of its page; None: the image cannot be used.
        pictures: paths of its pictures.
        classes: its most probable classes.
        layers: the numbers of each layer, see `layer_numbers`.
        problem: why the image cannot be used; None: it can.
    """

    image: str
    page: str | None = None
    pictures: tuple[str, ...] = ()
    classes: tuple[ClassShare, ...] = ()
    layers: tuple[dict[str, Any], ...] = ()
    problem: str | None = None

    def text(self) -> str:
        """The result in one line."""
        if self.problem is not None:
            return f"{self.image}: left out, {self.problem}"
        return f"{self.image}: {self.page}, and {len(self.pictures)} pictures beside it"


def explain(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    ema: bool | None = None,
    device: str = "auto",
    img_size: int | None = None,
    crop_pct: float | None = None,
    lines: Iterable[str] = (),
) -> Iterator[Explanation]:
    """Write a page about each image, and beside it a folder of the page's name with its pictures.

    Args:
        checkpoint: as for `load_trained`.
        images: as for `predict`.
        out: a folder; or for a single image the page, a name that ends in `.html`.
        ema: as for `load_trained`.
        device: "auto", "cpu" or "cuda".
        img_size: as for `load_trained`.
        crop_pct: as for `load_trained`.
        lines: as for `predict`.

    Returns:
        An iterator over what was written, in the order of the images.

    Raises:
        InputError: raised at the call: a path does not exist, the model has no parts to look into, or the pages would
            be written among the images.
    """
    trained = load_trained(checkpoint, ema, img_size, crop_pct)
    try:
        sites_of(trained.net, (trained.side, trained.side))
    except ModelError as error:
        raise InputError(f"{trained.name} cannot be explained", got=error) from None
    files = list_images(images, lines)
    pages = _pages(Path(out), files)
    if not trained.dense_trained:
        log.warning("%s was trained without its token head: the maps of its classes say nothing", trained.name)
    trained.log_assumptions()

    def explanations() -> Iterator[Explanation]:
        with joined_ranks(device) as ranks:
            trained.net.to(ranks.device)
            for image, page in zip(files, pages, strict=True):
                yield _explain(image, page, trained, ranks.device)

    return explanations()


def _pages(out: Path, files: Sequence[ImageFile]) -> list[Path]:
    """The page of each image. Raises InputError for one page of several images, or pictures among the images."""
    if out.suffix == PAGE:
        if len(files) > 1:
            raise InputError(
                "a page is about one image", got=f"{len(files)} images for {printable(out)!r}",
                remedy="Give `out` a folder.",
            )  # fmt: skip
        pages = [out]
    else:
        pages = list(picture_names(out, files, PAGE))
    written = {os.path.realpath(path) for page in pages for path in (page, page.with_suffix(""))}
    for image in files:
        path = os.path.realpath(image.path)
        if path in written or os.path.dirname(path) in written:
            raise InputError(
                "pictures would be written among the images", got=printable(image.path), remedy="Choose another `out`."
            )
    return pages


def _explain(image: ImageFile, page: Path, trained: Trained, device: torch.device) -> Explanation:
    name = printable(image.path)
    if image.problem is not None:
        return Explanation(name, problem=image.problem)
    try:
        pixels = load_image(image, trained)
    except BadImage as error:
        return Explanation(name, problem=str(error))
    inside = look_inside(trained.net, normalized([pixels], trained).to(device))
    classes = _first(inside, trained)
    pictures = _write(page, Path(image.key).name, pixels, inside, classes, trained)
    numbers = tuple(layer_numbers(layer) for layer in inside.layers)
    return Explanation(name, printable(page), tuple(map(printable, pictures)), classes, numbers)


def _first(inside: Inside, trained: Trained) -> tuple[ClassShare, ...]:
    best = inside.logits.softmax(0).topk(min(TOP, len(inside.logits)))
    numbered = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(ClassShare(number, trained.class_name(number), share) for number, share in numbered)


def _write(
    page: Path, name: str, pixels: np.ndarray, inside: Inside, classes: Sequence[ClassShare], trained: Trained
) -> list[Path]:
    """Write the pictures, then the page. Raises InputError if that is impossible."""
    sheets = sheets_of(pixels, inside, trained)
    pictures = {page.with_suffix("") / f"{sheet.key}.png": sheet.png for sheet in sheets}
    tokens = inside.layers[0].length.numel()
    html = page_of(printable(name), inside, classes, sheets, trained, tokens)
    for path, data in {**pictures, page: html.encode("utf-8", "backslashreplace")}.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
        except OSError as error:
            raise InputError(f"{printable(path)!r} cannot be written", got=error.strerror) from None
    return list(pictures)
