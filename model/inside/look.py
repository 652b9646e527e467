"""`look_inside`: the measures of every layer of a network on one image.

Legend: C classes; h×w grid of a layer's tokens; L sequence length; K states that decay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from labeler.base.errors import ModelError
from model.feature_maps import evaluation
from model.inside.flows import Flow
from model.inside.measures import DirectionInside, LayerInside, forget_gate
from model.inside.sites import Site, sites_of


@dataclass(frozen=True)
class Inside:
    """What a network does inside with one image; all tensors are on the CPU.

    Attributes:
        logits: its class logits, float32 [C].
        layers: its layers that have a mixer.
    """

    logits: torch.Tensor
    layers: tuple[LayerInside, ...]


def look_inside(net: nn.Module, images: torch.Tensor) -> Inside:
    """Run a network on an image and measure its layers.

    Args:
        net: a DeMansia, DeMansia-2, Vim, MILA or MambaVision network.
        images: one image, [1, in_chans, height, width].

    Returns:
        The measures.

    Raises:
        ModelError: a network of another kind, several images, or an image that does not fit.
    """
    sites = sites_of(net, (images.shape[-2], images.shape[-1]))
    if images.ndim != 4 or len(images) != 1:
        raise ModelError("one image at a time", got=list(images.shape), expected="[1, channels, height, width]")
    with evaluation(net), torch.no_grad():
        logits, seen = _watched(net, images, sites)
        layers = [_measure(site, seen) for site in sites]
    last = layers[-1].classes if layers else None
    if last is not None:
        layers = [
            layer if layer.classes is None else replace(layer, settled=float((layer.classes == last).double().mean()))
            for layer in layers
        ]
    return Inside(logits.float().cpu()[0], tuple(layers))


Seen = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]


def _watched(net: nn.Module, images: torch.Tensor, sites: list[Site]) -> tuple[torch.Tensor, Seen]:
    """Run the network: its logits, and input and output of each block and each normalization."""
    seen: Seen = {}

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        seen[module] = inputs[0], output

    handles = [module.register_forward_hook(keep) for site in sites for module in (site.block, site.norm)]
    try:
        return net(images), seen
    finally:
        for handle in handles:
            handle.remove()


def _measure(site: Site, seen: Seen) -> LayerInside:
    entering, normed = seen[site.norm]
    parts = site.parts(normed)
    added = [site.to_map(flow.output.float().norm(dim=-1)) for flow in parts.flows]
    total = sum(float(one.double().mean()) for one in added)
    directions = tuple(_direction(site, flow, one, total) for flow, one in zip(parts.flows, added, strict=True))
    gate = None if parts.gate is None else site.to_map(parts.gate.float().mean(-1)).cpu()
    length, even = (site.to_map(x.float().norm(dim=-1)).cpu() for x in (entering, normed))
    layer = LayerInside(site.name, site.mixer, gate, directions, length, even)
    if site.head is None:
        return layer
    best = site.head(seen[site.block][1]).float().softmax(-1).max(-1)
    # The head's tokens are those of the map, whose grid every value shares.
    probability, classes = (part.unflatten(0, layer.length.shape).cpu() for part in (best.values, best.indices))
    return replace(layer, classes=classes, probability=probability)


def _direction(site: Site, flow: Flow, added: torch.Tensor, total: float) -> DirectionInside:
    return DirectionInside(
        flow.name,
        added.cpu(),
        float(added.double().mean()) / total if total else 0.0,
        None if flow.step is None else site.to_map(flow.step.float().mean(-1)).cpu(),
        None if flow.input_weight is None else site.to_map(flow.input_weight.float()).cpu(),
        None if flow.log_decay is None else forget_gate(flow.log_decay),
        *(() if flow.results is None else (site.to_map(lengths).cpu() for lengths in flow.results)),
    )
