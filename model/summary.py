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

from model.ops.scan_operators import scan_flops
from model.wrapper import create_backbone


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

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(image)
    macs = _macs_by_part(counter.get_flop_counts(), type(net).__name__)
    tokens = (net.grid[0] * net.grid[1]) if hasattr(net, "grid") else 0
    return Cost(side, tokens, {part: count // 2 for part, count in macs.items()}, sum(kept.values()) // 2)


def _macs_by_part(counts: dict[str, dict[Any, int]], root: str) -> dict[str, int]:
    """Multiply-adds of both images by direct child of the model, scans apart; a multiply-add counts as two flops."""
    macs: dict[str, int] = defaultdict(int)
    for path, by_operator in counts.items():
        parts = path.split(".")
        if parts[0] == root and (len(parts) == 2 or (len(parts) == 3 and parts[1] in ("layers", "blocks"))):
            macs[parts[1]] += sum(flops for operator, flops in by_operator.items() if not _is_scan(operator)) // 2
    everything = counts.get("Global", {})
    scans = sum(flops for operator, flops in everything.items() if _is_scan(operator)) // 2
    missing = sum(everything.values()) // 2 - sum(macs.values()) - scans
    if missing > 0:
        macs["other"] = missing
    return {**macs, "scan": scans} if scans else dict(macs)


def _is_scan(operator: Any) -> bool:
    return str(operator).startswith("token_labeling.scan")


def fvcore_handles() -> dict[str, Any]:
    """Handles that let fvcore count the scan's multiply-adds.

    Use: `fvcore.nn.FlopCountAnalysis(net, images).set_op_handle(**fvcore_handles())`.
    """

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        shapes = [value.type().sizes() for value in inputs[:3]]
        return scan_flops(*shapes) // 2

    return {f"token_labeling::{name}": handle for name in ("scan_cpu", "scan_triton")}
