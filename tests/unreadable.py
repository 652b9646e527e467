"""A device that cannot be read: torch's meta device, which holds no numbers, and a watch over copies to it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")


def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave autocast out: the meta device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


class Unreadable(TorchDispatchMode):
    """Fails at each operation that would wait for the device: reads, sizes that depend on values, blocking copies."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        on_device = any(one.is_meta for one in tensors)
        assert not (on_device and any(word in name for word in WAIT)), f"{name} waits for the device"
        if "copy" in name and tensors and not all(one.is_meta for one in tensors):
            target = kwargs.get("device")
            if on_device or (target is not None and target.type == "meta"):
                assert kwargs.get("non_blocking") or args[-1] is True, f"{name} waits for a copy"
        if "index" in name and on_device:
            indices = [one for arg in args if isinstance(arg, (list, tuple)) for one in arg if one is not None]
            assert not any(one.dtype == torch.bool for one in indices), f"{name} by a mask waits for its size"
        return func(*args, **kwargs)
