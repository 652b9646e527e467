"""Tensors that can get their former values back, by a decision that only the device knows.

The host queues the same operations whether a step is taken back or not, so it does not wait for the decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Rollback:
    """Keeps copies of tensors, bit for bit.

    Args:
        tensors: the tensors, on one device; they are changed in place and never replaced.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.tensors = list(tensors)
        # As whole numbers: 0 times a NaN is a NaN, but 0 times its bits is 0.
        self._words = [one.detach().view(WORDS[one.element_size()]) for one in self.tensors]
        self._copies = [torch.empty_like(one) for one in self._words]
        sizes = {one.element_size() for one in self._words}
        pairs = list(zip(self._words, self._copies, strict=True))
        grouped = [[pair for pair in pairs if pair[0].element_size() == size] for size in sorted(sizes)]
        self._groups = [([word for word, _ in group], [copy for _, copy in group]) for group in grouped]

    @torch.no_grad()
    def save(self) -> None:
        """Copy the present values."""
        for words, copies in self._groups:
            torch._foreach_copy_(copies, words)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give all tensors the values that were saved last."""
        for words, copies in self._groups:
            torch._foreach_copy_(words, copies)

    @torch.no_grad()
    def put_back_if(self, wanted: torch.Tensor) -> None:
        """`put_back` where `wanted`, a bool without dimensions on the device, is true. The copies are used up."""
        times: Any = torch._foreach_mul_
        for words, copies in self._groups:
            # new · (1 − wanted) + old · wanted: one of the two is 0.
            times(words, (~wanted).to(words[0].dtype))
            times(copies, wanted.to(words[0].dtype))
            torch._foreach_add_(words, copies)

    def changed(self) -> list[bool]:
        """Which tensors differ from their copies; waits for the device."""
        return [not torch.equal(word, copy) for word, copy in zip(self._words, self._copies, strict=True)]


class ChangingBuffers:
    """The buffers of a network that a training step changes: statistics of BatchNorm, and what the first step changes.

    Args:
        net: the network.
    """

    def __init__(self, net: nn.Module) -> None:
        statistics = {
            id(one) for part in net.modules() if isinstance(part, _NormBase) for one in part.buffers(recurse=False)
        }
        self._all = list(net.buffers())
        self._wanted = [id(one) in statistics for one in self._all]
        self._kept, self._first = Rollback(self._all), True

    def save(self) -> None:
        """Copy the present values, before a step."""
        if not self._first and sum(self._wanted) < len(self._kept.tensors):
            self._kept = Rollback(one for one, wanted in zip(self._all, self._wanted, strict=True) if wanted)
        self._kept.save()

    def note_changes(self) -> None:
        """See which buffers the first step has changed; in that step this waits for the device."""
        if self._first:
            self._first = False
            self._wanted = [a or b for a, b in zip(self._wanted, self._kept.changed(), strict=True)]

    def put_back(self) -> None:
        """Undo the step's changes."""
        self._kept.put_back()

    def put_back_if(self, wanted: torch.Tensor) -> None:
        """Undo them where `wanted`, a bool without dimensions on the device, is true."""
        self._kept.put_back_if(wanted)
