"""Where a network's blocks are, and how the values of a block's tokens become a map. A kind of network is one function.

Legend: h×w grid of a layer's tokens; L sequence length; D width; W windows; L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model.backbones.hierarchical.mambavision_layers import ConvBlock, from_windows
from model.backbones.hierarchical.mambavision_model import MambaVision
from model.backbones.hierarchical.mila import Mila
from model.backbones.hierarchical.mila_attention import on_map
from model.backbones.hierarchical.mila_layers import Block as MilaBlock
from model.backbones.vision_mamba import VisionMamba
from model.inside.flows import Flow, Parts, mixer_parts
from model.inside.normalizers import results_of_mila
from model.token_heads import without_token

SUPPORTED = "DeMansia, DeMansia-2, Vim, MILA or MambaVision"
Size = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """A block whose inside is measured.

    Attributes:
        name: its name in the model.
        mixer: name of its mixer's class.
        block: the block.
        norm: the normalization in front of its mixer.
        parts: takes the normalization's output; the parts of the mixer.
        to_map: takes values of an image's tokens in the block's layout, without channels; gives [h, w].
        head: takes the block's output; the token head's logits, [T, C] of the image. None: the head does not fit it.
    """

    name: str
    mixer: str
    block: nn.Module
    norm: nn.Module
    parts: Callable[[torch.Tensor], Parts]
    to_map: Callable[[torch.Tensor], torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor] | None


def sites_of(net: nn.Module, size: Size) -> list[Site]:
    """The blocks of a network.

    Args:
        net: the network.
        size: height and width of the images.

    Returns:
        The blocks that have a mixer, in their order.

    Raises:
        ModelError: a network of another kind.
    """
    for kind, find in KINDS.items():
        if isinstance(net, kind):
            return list(find(net, size))
    name = type(getattr(net, "backbone", net)).__name__
    raise ModelError("this model has no parts to look into", got=name, expected=SUPPORTED)


def _of_vision_mamba(net: VisionMamba, _: Size) -> Iterator[Site]:
    def to_map(values: torch.Tensor) -> torch.Tensor:
        return without_token(values, net.cls_position(values.shape[1]))[0].unflatten(0, net.grid)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return _first_image(net.token_logits(net.norm_f(hidden))[1])

    for i, block in enumerate(net.layers):
        mixer: Any = block.mixer

        def parts(normed: torch.Tensor, mixer: Any = mixer) -> Parts:
            return mixer_parts(mixer, normed)

        usable = None if net.aux_head is None else head
        yield Site(f"layers.{i}", type(mixer).__name__, block, block.norm, parts, to_map, usable)  # type: ignore[arg-type]


def _of_mila(net: Mila, _: Size) -> Iterator[Site]:
    def to_map(values: torch.Tensor) -> torch.Tensor:
        return values[0]

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return _first_image(net.token_logits(net.norm(hidden))[1])

    for i, stage in enumerate(net.layers):
        last = i + 1 == len(net.layers) and net.aux_head is not None
        for j, block in enumerate(stage.blocks):  # type: ignore[arg-type]

            def parts(normed: torch.Tensor, block: MilaBlock = block) -> Parts:
                return _mila_parts(block, normed)

            name, mixer = f"layers.{i}.blocks.{j}", type(block.attn).__name__
            yield Site(name, mixer, block, block.norm1, parts, to_map, head if last else None)


def _mila_parts(block: MilaBlock, normed: torch.Tensor) -> Parts:
    """Gate and branches of a MILA block: its attention and, beside it, a convolution of the values."""
    x = F.silu(on_map(block.dwc, block.in_proj(normed)))
    gate, local = F.silu(block.act_proj(normed)), on_map(block.attn.lepe, x)
    attended, beside = (F.linear(part * gate, block.out_proj.weight) for part in (block.attn(x) - local, local))
    results = results_of_mila(block.attn, x)
    return Parts(gate, (Flow("attention", attended, results=results), Flow("convolution", beside)))


def _of_mambavision(net: MambaVision, size: Size) -> Iterator[Site]:
    for i, (level, info) in enumerate(zip(net.levels, net.feature_info, strict=True)):
        grid, window = net._cells(size, info["reduction"]), level.window
        last = i + 1 == len(net.levels) and net.aux_head is not None
        like = torch.empty(1, 1, *grid)

        def to_map(values: torch.Tensor, window: Any = window, like: torch.Tensor = like) -> torch.Tensor:
            return from_windows(values.unsqueeze(-1), window, like)[0, 0]

        def head(hidden: torch.Tensor, window: Any = window, like: torch.Tensor = like) -> torch.Tensor:
            return _first_image(net.token_logits(net.norm(from_windows(hidden, window, like)))[1])

        for j, block in enumerate(level.blocks):  # type: ignore[arg-type]
            if isinstance(block, ConvBlock):
                continue

            def parts(normed: torch.Tensor, block: Any = block) -> Parts:
                return _scaled(mixer_parts(block.mixer, normed), block.gamma_1)

            name, mixer = f"levels.{i}.blocks.{j}", type(block.mixer).__name__
            yield Site(name, mixer, block, block.norm1, parts, to_map, head if last else None)


def _scaled(parts: Parts, gamma: torch.Tensor | None) -> Parts:
    """Parts with the factors [D] of a layer scale in their outputs."""
    if gamma is None:
        return parts
    return Parts(parts.gate, tuple(replace(flow, output=flow.output * gamma) for flow in parts.flows))


def _first_image(logits: torch.Tensor | None) -> torch.Tensor:
    assert logits is not None  # a site without a head has none of these functions
    return logits[0]


KINDS: dict[type[nn.Module], Callable[[Any, Size], Iterator[Site]]] = {
    VisionMamba: _of_vision_mamba,
    Mila: _of_mila,
    MambaVision: _of_mambavision,
}
