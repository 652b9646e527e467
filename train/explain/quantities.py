"""The measured quantities by name, each with a sentence that says in plain words what it is.

Legend: h×w grid of a layer's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from model.inside.look import Inside
from model.inside.measures import LayerInside

GATE = (
    "Gate",
    "How wide the block's gate lets each token's result pass: silu(z), mean over channels. Bright tokens are passed "
    "on, dark ones held back.",
)
STEP = (
    "Step size",
    "How much each token changes the state: dt behind its softplus, mean over channels. With a large step the state "
    "takes the token in and forgets those before it; with a small one it passes the token over.",
)
WEIGHT = (
    "Input gate",
    "How strongly each token is written into the states: mean of |dt·B| over channels and states, or of what stands "
    "in its place.",
)
CONTRIBUTION = (
    "Contribution of each direction",
    "Length of the vector that a direction or branch adds to each token, behind gate and output layer. Where it is "
    "dark, the block would be the same without it.",
)
DIVIDED = (
    "Length of attention's results, normalized",
    "Length of the vector that linear attention gives each token, divided by the sum of the token's weights.",
)
UNDIVIDED = (
    "Length of attention's results, not normalized",
    "The same without that division, as Mamba's design has it. The more uneven, the more a few tokens outweigh the "
    "others.",
)
LENGTH = (
    "Length of the tokens entering each layer",
    "Length of each token's vector in the sum of all layers before. A few long tokens can outweigh all others.",
)
NORMED = (
    "Length of the tokens behind the normalization",
    "The same behind the block's normalization, as the mixer reads it. The nearer to even, the more equally tokens "
    "count.",
)
CLASSES = (
    "Class of each token, layer by layer",
    "First class of the token head where it reads each layer's output in place of the last one's, through the final "
    "normalization; the stronger the color, the more probable. It was trained on the last layer alone.",
)
FORGET = (
    "Forget gate",
    "What each step keeps of the states, exp(dt·A), from 0 (all is forgotten) to 1 (nothing is), over all tokens, "
    "channels and states: a histogram for each direction. Below it their mean, and how many tokens back a state "
    "reaches that decays by it, −1 / log(mean).",
)


@dataclass(frozen=True)
class Panel:
    """A map of one layer.

    Attributes:
        layer: the layer's name.
        values: [h, w].
        low: value of the darkest color.
        high: value of the brightest color.
    """

    layer: str
    values: torch.Tensor
    low: float
    high: float


@dataclass(frozen=True)
class Quantity:
    """One quantity in all layers that have it.

    Attributes:
        key: its name, and that of its file.
        title: its heading.
        meaning: a sentence.
        panels: its maps.
    """

    key: str
    title: str
    meaning: str
    panels: tuple[Panel, ...]


def quantities(inside: Inside) -> list[Quantity]:
    """The quantities that at least one layer has, as maps."""
    layers, names = inside.layers, direction_names(inside)
    found = [_quantity("gate", *GATE, ((layer.name, layer.gate) for layer in layers))]
    for name in names:
        found.append(_quantity(f"step-{name}", f"{STEP[0]}: {name}", STEP[1], _in(layers, name, "step")))
        found.append(_quantity(f"weight-{name}", f"{WEIGHT[0]}: {name}", WEIGHT[1], _in(layers, name, "input_weight")))
    # Directions of a layer are compared, so they share a scale.
    tops = {layer.name: max(float(one.contribution.max()) for one in layer.directions) for layer in layers}
    for name in names:
        maps = _in(layers, name, "contribution")
        found.append(_quantity(f"contribution-{name}", f"{CONTRIBUTION[0]}: {name}", CONTRIBUTION[1], maps, tops))
    for name in names:
        for part, text in (("divided", DIVIDED), ("undivided", UNDIVIDED)):
            lengths = [(layer, values) for layer, values in _in(layers, name, part) if values is not None]
            tops = {layer: float(values.max()) for layer, values in lengths}
            found.append(_quantity(f"{part}-{name}", f"{text[0]}: {name}", text[1], lengths, tops))
    for key, text, maps in (
        ("length", LENGTH, [(layer.name, layer.length) for layer in layers]),
        ("length-normalized", NORMED, [(layer.name, layer.normed_length) for layer in layers]),
    ):
        found.append(_quantity(key, *text, maps, {layer: float(values.max()) for layer, values in maps}))
    return [one for one in found if one.panels]


def direction_names(inside: Inside) -> list[str]:
    """Names of all directions, in the order of their first layers."""
    return list(dict.fromkeys(direction.name for layer in inside.layers for direction in layer.directions))


Maps = Iterable[tuple[str, torch.Tensor | None]]


def _in(layers: Iterable[LayerInside], name: str, attribute: str) -> Maps:
    """An attribute of the direction `name` in each layer that has it."""
    return [(layer.name, getattr(one, attribute)) for layer in layers for one in layer.directions if one.name == name]


def _quantity(key: str, title: str, meaning: str, maps: Maps, tops: Mapping[str, float] | None = None) -> Quantity:
    """A quantity; `tops`: by layer the end of a scale from 0, None: each map has the scale of its own values."""
    panels = [
        Panel(name, values, *((float(values.min()), float(values.max())) if tops is None else (0.0, tops[name])))
        for name, values in maps
        if values is not None
    ]
    return Quantity(key.lower(), title, meaning, tuple(panels))
