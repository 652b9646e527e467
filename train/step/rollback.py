"""Tensors that can get their former values back, by a decision that only the device knows.

The host queues the same operations whether a step is taken back or not, so it does not wait for the decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Rollback:
    """Keeps copies of tensors, bit for bit.

    Args:
        tensors: the tensors, on one device; they are changed in place and never replaced.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.tensors = list(tensors)
        # As whole numbers: 0 times a NaN is a NaN, but 0 times its bits is 0.
        groups: dict[int, list[torch.Tensor]] = {}
        for tensor in self.tensors:
            size = tensor.element_size()
            groups.setdefault(size, []).append(tensor.detach().view(WORDS[size]))
        self._groups = list(groups.values())
        self._copies = [[torch.empty_like(one) for one in group] for group in self._groups]

    @torch.no_grad()
    def save(self) -> None:
        """Copy the present values."""
        for group, copies in zip(self._groups, self._copies, strict=True):
            torch._foreach_copy_(copies, group)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give all tensors the values that were saved last."""
        for group, copies in zip(self._groups, self._copies, strict=True):
            torch._foreach_copy_(group, copies)

    @torch.no_grad()
    def put_back_if(self, wanted: torch.Tensor) -> None:
        """`put_back` where `wanted`, a bool without dimensions on the device, is true. The copies are used up."""
        for group, copies in zip(self._groups, self._copies, strict=True):
            _select(group, copies, wanted)


class ChangingBuffers:
    """The buffers of a network that a training step changes: the statistics of BatchNorm.

    Which these are is seen in the first step, before which all are saved.

    Args:
        net: the network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._all = list(net.buffers())
        self._changing: list[bool] | None = None
        self._kept = Rollback(self._all)
        self._versions: list[int] = []

    def save(self) -> None:
        """Copy the present values, before a step."""
        if self._changing is not None and sum(self._changing) != len(self._kept.tensors):
            self._kept = Rollback(one for one, changes in zip(self._all, self._changing, strict=True) if changes)
        self._versions = [one._version for one in self._all]
        self._kept.save()

    def note_changes(self) -> None:
        """See which buffers have changed since `save`."""
        before = self._changing or [False] * len(self._all)
        changed = [one._version != version for one, version in zip(self._all, self._versions, strict=True)]
        self._changing = [a or b for a, b in zip(before, changed, strict=True)]

    def put_back(self) -> None:
        """Undo the step's changes."""
        self._kept.put_back()

    def put_back_if(self, wanted: torch.Tensor) -> None:
        """Undo them where `wanted`, a bool without dimensions on the device, is true."""
        self._kept.put_back_if(wanted)


def _select(group: list[torch.Tensor], copies: list[torch.Tensor], wanted: torch.Tensor) -> None:
    """Set a group to new · (1 − wanted) + old · wanted, in whole numbers, where one of the summands is 0."""
    times: Any = torch._foreach_mul_
    times(group, (~wanted).to(group[0].dtype))
    times(copies, wanted.to(group[0].dtype))
    torch._foreach_add_(group, copies)
