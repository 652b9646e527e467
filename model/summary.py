"""The cost of a model: parameters, multiply-adds by part, and activation memory by resolution.

Legend: B images.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.create import create_backbone
from model.mixers import Mixer
from model.ops.scan_operators import NAMESPACE, scan_flops

OURS = f"{NAMESPACE}."  # how the names of the project's operators begin


@dataclass(frozen=True)
class Cost:
    """Cost of one image at one resolution.

    Attributes:
        resolution: image side in pixels.
        tokens: patch tokens; 0: the model has no token grid.
        macs: part of the model -> multiply-adds of a forward pass; a product and a sum count as one.
        activations: bytes that autograd keeps for the backward pass in float32, without the parameters.
    """

    resolution: int
    tokens: int
    macs: dict[str, int]
    activations: int


@dataclass(frozen=True)
class Summary:
    """Parameters of a model and its cost at each resolution.

    Attributes:
        name: the model's name.
        parameters: part of the model -> number of parameters.
        costs: one entry for each resolution.
    """

    name: str
    parameters: dict[str, int]
    costs: tuple[Cost, ...]

    def text(self) -> str:
        """The summary as lines of text."""
        total = sum(self.parameters.values())
        lines = [f"{self.name}: {total:,} parameters"]
        lines += [f"  {part:14}{count:>14,}" for part, count in self.parameters.items()]
        for cost in self.costs:
            macs = sum(cost.macs.values())
            lines.append(
                f"{cost.resolution}² ({cost.tokens} tokens): {macs / 1e9:.2f} GMAC forward, "
                f"{cost.activations / 1e6:.0f} MB of activations per image"
            )
            lines += [f"  {part:14}{count / 1e6:>14,.1f} MMAC" for part, count in cost.macs.items()]
        return "\n".join(lines)


def summarize(name: str, resolutions: tuple[int, ...] | None = None, num_classes: int = 1000) -> Summary:
    """Measure a model by running it, with random weights, at each resolution.

    Args:
        name: a name for `timm.create_model`.
        resolutions: image sides in pixels; None: the model's own.
        num_classes: classes of both heads.

    Returns:
        Parameters and costs, for one image.
    """
    net: Any = create_backbone(name, num_classes=num_classes)
    own = net.default_cfg["input_size"][1] if hasattr(net, "default_cfg") else 224
    costs = tuple(_cost(name, side, num_classes) for side in resolutions or (own,))
    return Summary(name, _parameters(net), costs)


def _parameters(net: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for name, parameter in net.named_parameters():
        counts[name.split(".", 1)[0]] += parameter.numel()
    return dict(counts)


def _cost(name: str, side: int, num_classes: int) -> Cost:
    net: Any = create_backbone(name, num_classes=num_classes, img_size=side).train()
    image = torch.randn(2, 3, side, side)  # batch norm in training wants more than one
    kept: dict[int, int] = {}
    owned = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        macs = multiply_adds(net, image)
    tokens = (net.grid[0] * net.grid[1]) if hasattr(net, "grid") else 0
    return Cost(side, tokens, macs, sum(kept.values()) // 2)


def multiply_adds(net: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """Count the multiply-adds of a forward pass by running it.

    Args:
        net: the model.
        images: [B, channels, height, width].

    Returns:
        Part of the model -> multiply-adds for one image; a product and a sum count as one.
    """
    counter, by_mixers = FlopCounterMode(display=False), _counted_by_mixers(net)
    with counter:
        net(images)
    macs = _macs_by_part(counter.get_flop_counts(), type(net).__name__)
    macs |= {part: count + macs.get(part, 0) for part, count in by_mixers.items()}
    return {part: count // len(images) for part, count in macs.items()}


def _counted_by_mixers(net: nn.Module) -> dict[str, int]:
    """A dictionary to which each mixer adds its own multiply-adds when it runs."""
    macs: dict[str, int] = defaultdict(int)

    def count(mixer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        for part, each in mixer.macs_per_token().items():
            macs[part] += each * inputs[0].shape[0] * inputs[0].shape[1]

    for module in net.modules():
        if isinstance(module, Mixer):
            module.register_forward_pre_hook(count)
    return macs


def _macs_by_part(counts: dict[str, dict[Any, int]], root: str) -> dict[str, int]:
    """Multiply-adds of a forward pass by direct child of the model; a multiply-add counts as two flops.

    A list of blocks is not called itself, so what is summed are the outermost modules that were called. The project's
    own operators are left out: the mixers count them, on any backend.
    """

    def total(by_operator: dict[Any, int]) -> int:
        return sum(flops for operator, flops in by_operator.items() if not str(operator).startswith(OURS)) // 2

    macs: dict[str, int] = defaultdict(int)
    for path, by_operator in counts.items():
        parts = path.split(".")
        outer = (".".join(parts[:n]) for n in range(2, len(parts)))
        if parts[0] == root and len(parts) > 1 and not any(one in counts for one in outer):
            macs[parts[1]] += total(by_operator)
    missing = total(counts.get("Global", {})) - sum(macs.values())
    return {**macs, "other": missing} if missing > 0 else dict(macs)


def fvcore_handles() -> dict[str, Any]:
    """Handles that let fvcore count the scan's multiply-adds.

    Use: `fvcore.nn.FlopCountAnalysis(net, images).set_op_handle(**fvcore_handles())`.
    """

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        shapes = [value.type().sizes() for value in inputs[:3]]
        return scan_flops(*shapes) // 2

    return {f"{NAMESPACE}::{name}": handle for name in ("scan_cpu", "scan_numba", "scan_triton")}
