"""What a model costs: parameters, multiply-adds by part, and the memory of its activations by resolution.

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
    """Of one image at one resolution.

    macs         part of the model -> multiply-adds of a forward pass; a product and a sum count as one
    activations  bytes that autograd keeps for the backward pass in float32, without the parameters
    """

    resolution: int
    tokens: int
    macs: dict[str, int]
    activations: int


@dataclass(frozen=True)
class Summary:
    """parameters by part, and the cost at each resolution."""

    name: str
    parameters: dict[str, int]
    costs: tuple[Cost, ...]

    def text(self) -> str:
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
    """Measured by running a model with random weights on one image of each resolution (default: its own)."""
    net: Any = create_backbone(name, num_classes=num_classes)
    own = net.default_cfg["input_size"][1] if hasattr(net, "default_cfg") else 224
    costs = tuple(_cost(name, side, num_classes) for side in resolutions or (own,))
    return Summary(name, _parameters(net), costs)


def _parameters(net: nn.Module) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for name, parameter in net.named_parameters():
        found[name.split(".", 1)[0]] += parameter.numel()
    return dict(found)


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
    """Multiply-adds of both images by the model's direct children, scans apart; flop counters count two for each."""
    found: dict[str, int] = defaultdict(int)
    for path, by_operator in counts.items():
        parts = path.split(".")
        if parts[0] == root and (len(parts) == 2 or (len(parts) == 3 and parts[1] in ("layers", "blocks"))):
            found[parts[1]] += sum(flops for operator, flops in by_operator.items() if not _is_scan(operator)) // 2
    everything = counts.get("Global", {})
    scans = sum(flops for operator, flops in everything.items() if _is_scan(operator)) // 2
    missing = sum(everything.values()) // 2 - sum(found.values()) - scans
    if missing > 0:
        found["other"] = missing
    return {**found, "scan": scans} if scans else dict(found)


def _is_scan(operator: Any) -> bool:
    return str(operator).startswith("token_labeling.scan")


def fvcore_handles() -> dict[str, Any]:
    """For `fvcore.nn.FlopCountAnalysis(net, images).set_op_handle(**fvcore_handles())`: the scan's multiply-adds."""

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        shapes = [value.type().sizes() for value in inputs[:3]]
        return scan_flops(*shapes) // 2

    return {f"token_labeling::{name}": handle for name in ("scan_cpu", "scan_triton")}
