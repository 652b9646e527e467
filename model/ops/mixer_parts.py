"""What surrounds the scan in a Mamba mixer: causal convolution with SiLU, and the gate, plain or as one fused kernel.

Legend: K directions, B batch, L length, E inner width, W taps of the convolution.

The plain versions call the modules and torch's operators, and so can be traced, compiled, exported, transformed and
differentiated twice. The fused ones run where the scan's backend is `numba` and nothing looks inside.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import _get_current_dispatch_mode

from model.ops.scan_operators import transforms_are_active
from model.ops.selective_scan import choose_backend


class ReversedConv1d(nn.Conv1d):
    """A convolution along the sequence with its weights flipped: the first tap belongs to the latest step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, E, L] -> [B, E, L + padding]."""
        return self._conv_forward(x, self.weight.flip(-1), self.bias)


def conv_silu(
    x: torch.Tensor, convs: Sequence[nn.Conv1d], backend: str = "auto"
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """silu of a causal depthwise convolution per direction.

    Args:
        x: [B, L, E].
        convs: a module per direction, padded by W − 1 on both sides; a ReversedConv1d runs from the last step back.
        backend: of the scan.

    Returns:
        [K, B, L, E] in x's dtype, and its K parts.
    """
    if _fuses(x, backend) and all(_is_plain(conv) for conv in convs):
        weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
        reverse = tuple(isinstance(one, ReversedConv1d) for one in convs)
        u = _fused().conv_silu(x, weights, biases, reverse)
        return u, u.unbind()
    length, found = x.shape[1], []
    for conv in convs:
        # Both ends are padded: the first L outputs see the steps before them, the last L the steps after them.
        steps = conv(x.mT)
        found.append(F.silu(steps[..., -length:] if isinstance(conv, ReversedConv1d) else steps[..., :length]).mT)
    return torch.stack(found), found


def gate(y: torch.Tensor, z: torch.Tensor, scale: float, backend: str = "auto") -> torch.Tensor:
    """The sum of all directions times `scale` times silu(z): y [K, B, L, E], z [B, L, E] -> [B, L, E]."""
    if _fuses(y, backend):
        return _fused().gate(y, z, scale)
    return (y.sum(0) * scale) * F.silu(z)


def _fuses(x: torch.Tensor, backend: str) -> bool:
    """Whether the fused kernels may run: nothing traces, transforms or counts, and the scan's backend is `numba`."""
    if type(x) not in (torch.Tensor, nn.Parameter) or x.device.type != "cpu" or not x.numel():
        return False
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    if transforms_are_active() or _get_current_dispatch_mode() is not None:
        return False
    return choose_backend(backend, "cpu", x.dtype == torch.float64) == "numba"


def _is_plain(conv: nn.Conv1d) -> bool:
    """Whether a module does what its class does: no adapter in its place and no hook; its weights may be computed."""
    kind = type(conv).__bases__[0] if is_parametrized(conv) else type(conv)
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
    return kind in (nn.Conv1d, ReversedConv1d) and conv.bias is not None and not any(hooks)


def _fused():  # type: ignore[no-untyped-def]
    return importlib.import_module("model.ops.fused_cpu.mixer")
