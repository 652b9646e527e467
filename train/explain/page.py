"""The page of one image, self-contained, and the numbers in its table.

Legend: S input side.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

import labeler.report.template
from labeler.report.template import fill
from model.inside.look import Inside
from model.inside.measures import DirectionInside, LayerInside, Spread, spread
from train.evaluation.single_images import ClassShare
from train.evaluation.validate import Trained
from train.explain.quantities import CLASSES, FORGET, quantities
from train.explain.sheets import class_sheet, forget_sheet, map_sheet


class Sheet(NamedTuple):
    """A picture of the page.

    Attributes:
        key: name of its file, without suffix.
        title: its heading.
        meaning: a sentence.
        width: of the picture, in pixels.
        png: the picture.
    """

    key: str
    title: str
    meaning: str
    width: int
    png: bytes

    @property
    def text(self) -> str:
        """The picture as text for the page."""
        return base64.b64encode(self.png).decode()


def sheets_of(pixels: np.ndarray, inside: Inside, trained: Trained) -> list[Sheet]:
    """All pictures of an image.

    Args:
        pixels: the network's input before normalization, uint8 [S, S, 3].
        inside: what was measured.
        trained: the model, for its class names.

    Returns:
        The pictures of what at least one layer has.
    """
    found: list[tuple[str, str, str, Image.Image]] = []
    if any(layer.classes is not None for layer in inside.layers):
        found.append(("classes", *CLASSES, class_sheet(pixels, inside.layers, trained.aux_class_name)))
    if any(one.forget is not None for layer in inside.layers for one in layer.directions):
        found.append(("forget", *FORGET, forget_sheet(inside.layers)))
    found += [(one.key, one.title, one.meaning, map_sheet(pixels, one.panels)) for one in quantities(inside)]
    return [Sheet(key, title, meaning, picture.width, _png(picture)) for key, title, meaning, picture in found]


def page_of(
    name: str, inside: Inside, classes: Sequence[ClassShare], sheets: Sequence[Sheet], trained: Trained, tokens: int
) -> str:
    """The page as HTML.

    Args:
        name: the image's name.
        inside: what was measured.
        classes: the most probable classes of the image.
        sheets: its pictures.
        trained: the model.
        tokens: number of tokens of the first layer.

    Returns:
        The HTML.
    """
    style = Path(labeler.report.template.__file__).with_name("report.css").read_text()
    return fill(
        "page.html",
        Path(__file__).parent,
        title=name,
        checkpoint=trained.name,
        classes=classes,
        sheets=sheets,
        layers=[layer_numbers(layer) for layer in inside.layers],
        tokens=tokens,
        style=Markup(style),
    )


def _png(picture: Image.Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def layer_numbers(layer: LayerInside) -> dict[str, Any]:
    """The numbers of a layer, as plain values for JSON; a reach without end is None."""
    length, normed = spread(layer.length), spread(layer.normed_length)
    return {
        "name": layer.name,
        "mixer": layer.mixer,
        "gate": None if layer.gate is None else float(layer.gate.double().mean()),
        "directions": [_direction_numbers(one) for one in layer.directions],
        "length": length.mean,
        "length_spread": _relative(length),
        "normed_length": normed.mean,
        "normed_length_spread": _relative(normed),
        "settled": layer.settled,
    }


def _direction_numbers(one: DirectionInside) -> dict[str, Any]:
    forget = one.forget
    unevenness = {
        f"{part}_spread": None if lengths is None else _relative(spread(lengths))
        for part, lengths in (("divided", one.divided), ("undivided", one.undivided))
    }
    return {
        "name": one.name,
        "share": one.share,
        "contribution": float(one.contribution.double().mean()),
        "step": None if one.step is None else float(one.step.double().mean()),
        "input_weight": None if one.input_weight is None else float(one.input_weight.double().mean()),
        "kept": None if forget is None else forget.mean,
        "kept_histogram": None if forget is None else forget.histogram,
        "reach": None if forget is None or math.isinf(forget.reach) else forget.reach,
        "long_reach": None if forget is None or math.isinf(forget.long_reach) else forget.long_reach,
        **unevenness,
    }


def _relative(values: Spread) -> float:
    """Standard deviation over mean; 0 where all values are 0."""
    return values.std / values.mean if values.mean else 0.0
