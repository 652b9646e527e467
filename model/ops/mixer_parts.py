"""What surrounds the scan in a Mamba mixer: convolution with SiLU, step sizes and gate, by modules or fused kernels.

Legend: K directions, B batch, L length, E inner width, N state size, R rank of the step size, W taps.

The plain versions call the modules and torch's operators, and so can be traced, compiled, exported, transformed and
differentiated twice. The fused ones run where the scan's backend is `numba` or `triton` and nothing looks inside.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence

import torch
import torch.fx
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


@torch.fx.wrap
def wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`F.linear` in at least float32, even under autocast."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    device = x.device.type
    known = torch.amp.is_autocast_available(device)  # "meta" has none
    with torch.autocast(device, enabled=False) if known else contextlib.nullcontext():
        return F.linear(x.to(wide), weight.to(wide), bias.to(wide))


class StepSize(nn.Linear):
    """A linear layer that computes in at least float32, for any dtype of weights and input, even under autocast.

    Its bias is near −5, where bfloat16 would change the step size by a few percent.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, R] -> [B, L, E]."""
        return wide_linear(x, self.weight, self.bias)


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
    fused = _fused(x, backend)
    if fused and all(_is_plain(conv, nn.Conv1d, ReversedConv1d) and conv.bias is not None for conv in convs):
        reverse = tuple(isinstance(one, ReversedConv1d) for one in convs)
        if fused == "triton":
            u = _triton().ConvSilu.apply(x, _taps(convs), reverse)
        else:
            u = _numba().conv_silu(x, [conv.weight for conv in convs], [conv.bias for conv in convs], reverse)
        return u, u.unbind()
    length, found = x.shape[1], []
    for conv in convs:
        # Both ends are padded: the first L outputs see the steps before them, the last L the steps after them.
        steps = conv(x.mT)
        found.append(F.silu(steps[..., -length:] if isinstance(conv, ReversedConv1d) else steps[..., :length]).mT)
    return torch.stack(found), found


def gate(y: torch.Tensor, z: torch.Tensor, scale: float, backend: str = "auto") -> torch.Tensor:
    """The sum of all directions times `scale` times silu(z): y [K, B, L, E], z [B, L, E] -> [B, L, E]."""
    fused = _fused(y, backend)
    if fused == "triton":
        return _triton().Gate.apply(y, z, scale)
    if fused == "numba":
        return _numba().gate(y, z, scale)
    # With its dtype, as autocast would make the sum float32.
    return (y.sum(0, dtype=y.dtype) * scale) * F.silu(z)


def fused_core(
    xz: torch.Tensor,
    convs: Sequence[nn.Conv1d],
    x_projs: Sequence[nn.Linear],
    dt_projs: Sequence[nn.Linear],
    a_logs: Sequence[torch.Tensor],
    skips: Sequence[torch.Tensor],
    scale: float,
    backend: str = "auto",
) -> torch.Tensor | None:
    """All between the outer projections of a Mamba mixer on a GPU, in few kernels and little memory.

    Args:
        xz: [B, L, 2 E].
        convs: as for `conv_silu`.
        x_projs: a module per direction, without bias.
        dt_projs: a StepSize per direction.
        a_logs: the logarithm of −A per direction, [E, N].
        skips: D per direction, [E].
        scale: as for `gate`.
        backend: of the scan.

    Returns:
        [B, L, E]; None where it cannot run, as the backend is not `triton` or something replaces or hooks a module.
    """
    plain = all(_is_plain(conv, nn.Conv1d, ReversedConv1d) and conv.bias is not None for conv in convs)
    plain &= all(_is_plain(one, nn.Linear) and one.bias is None for one in x_projs)
    plain &= all(_is_plain(one, StepSize) and one.bias is not None for one in dt_projs)
    if not plain or _fused(xz, backend) != "triton":
        return None
    # Under autocast `stack` keeps the widest dtype, as the parameters have it.
    return _triton().Core.apply(
        xz,
        _taps(convs),
        torch.stack([one.weight for one in x_projs]),
        torch.stack([one.weight for one in dt_projs]),
        torch.stack([one.bias for one in dt_projs]),
        -torch.exp(torch.stack(list(a_logs)).float()),
        torch.stack(list(skips)).float(),
        tuple(isinstance(one, ReversedConv1d) for one in convs),
        scale,
    )


def _taps(convs: Sequence[nn.Conv1d]) -> torch.Tensor:
    """[K, W + 1, E] in float32: the taps in the order of each direction's time, then the bias."""
    rows = [row for conv in convs if conv.bias is not None for row in (conv.weight[:, 0].mT, conv.bias[None])]
    return torch.cat(rows).float().unflatten(0, (len(convs), -1))


def _fused(x: torch.Tensor, backend: str) -> str | None:
    """The scan's backend, if it has fused kernels and they may run: nothing traces, transforms or counts."""
    if type(x) not in (torch.Tensor, nn.Parameter) or x.device.type not in ("cpu", "cuda") or not x.numel():
        return None
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return None
    if transforms_are_active() or _get_current_dispatch_mode() is not None:
        return None
    name = choose_backend(backend, x.device.type, x.dtype == torch.float64)
    return name if name in ("numba", "triton") else None


def _is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module does what its class does: no adapter in its place and no hook; its weights may be computed."""
    kind = type(module).__bases__[0] if is_parametrized(module) else type(module)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return kind in kinds and not any(hooks)


def _numba():  # type: ignore[no-untyped-def]
    return importlib.import_module("model.ops.fused_cpu.mixer")


def _triton():  # type: ignore[no-untyped-def]
    return importlib.import_module("model.ops.mixer_triton")
