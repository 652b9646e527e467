"""What each mixer computes inside, recomputed in plain PyTorch from its input, whatever backend it runs on.

Legend: B images; L sequence length; D model width; E inner width; H heads; N state size; K states that decay.

Every reader splits its mixer's output into the parts that its directions add: their sum is that output, but for the
bias of the last layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from model.inside.measures import input_weight
from model.inside.normalizers import Results, results_of_attention
from model.mixers import (
    BidirectionalMamba,
    BidirectionalMamba2,
    BidirectionalMamba3,
    DeMansia2Mixer,
    GatedConv,
    LinearAttentionMixer,
)
from model.mixers.mamba2 import Mamba2Directions
from model.mixers.mamba3 import LEAST_DECAY, heavy_tail
from model.mixers.mambavision import MambaVisionMixer
from model.mixers.parts import widen
from model.ops import scan_reference
from model.ops.mixer_parts import conv_silu

NAMES = {"": "forward", "_b": "backward"}


@dataclass(frozen=True)
class Flow:
    """One direction of a mixer on a sequence, the first token first.

    Attributes:
        name: as in `DirectionInside`.
        output: [B, L, D]: what it adds to the mixer's output.
        step: dt, [B, L, E or H]; None: it has none.
        log_decay: [B, L, K], logarithm of what a step keeps of each state; None: it forgets nothing.
        input_weight: [B, L]: mean of |dt·B|; None: there is none.
        results: lengths of linear attention's results with and without its normalization; None: it is none.
    """

    name: str
    output: torch.Tensor
    step: torch.Tensor | None = None
    log_decay: torch.Tensor | None = None
    input_weight: torch.Tensor | None = None
    results: Results | None = None


@dataclass(frozen=True)
class Parts:
    """The parts of a mixer.

    Attributes:
        gate: silu(z), [B, L, E]; None: it has no gate.
        flows: its directions.
    """

    gate: torch.Tensor | None
    flows: tuple[Flow, ...]


def mixer_parts(mixer: nn.Module, hidden: torch.Tensor) -> Parts:
    """The parts of a mixer on its input.

    Args:
        mixer: a mixer; one of a kind that is not known here has one part, its output.
        hidden: its input, [B, L, D].

    Returns:
        Its parts.
    """
    reader = READERS.get(type(mixer))
    return Parts(None, (Flow("mixer", mixer(hidden)),)) if reader is None else reader(mixer, hidden)


def _project(mixer: Any, y: torch.Tensor) -> torch.Tensor:
    """The last linear layer without its bias, and the factors of a layer scale: [B, L, E] -> [B, L, D]."""
    out = F.linear(y.to(mixer.out_proj.weight.dtype), mixer.out_proj.weight)
    gamma = getattr(mixer, "gamma", None)
    return out if gamma is None else out * gamma


def _mamba(mixer: BidirectionalMamba, hidden: torch.Tensor) -> Parts:
    x, z = mixer.in_proj(hidden).chunk(2, -1)
    gate = F.silu(z)
    _, each = conv_silu(x, [getattr(mixer, f"conv1d{name}") for name in mixer.directions], "reference")
    flows = []
    for u, name in zip(each, mixer.directions, strict=True):
        delta, a, b, c, skip = mixer._scan_inputs(u, name)
        step = F.softplus(delta)
        y = _scanned(u, step, a, b, c, skip, name == "_b")
        output = _project(mixer, y * mixer.scale * gate)
        flows.append(Flow(NAMES[name], output, step, _log_decay(step, a), input_weight(step, b)))
    return Parts(gate, tuple(flows))


def _scanned(
    u: torch.Tensor, step: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, skip: torch.Tensor,
    reverse: bool,
) -> torch.Tensor:  # fmt: skip
    """y of one direction: u and dt [B, L, E], A [E, N], B and C [B, L, N], D [E] -> [B, L, E]."""
    one, dt, rates, inputs, outputs, through = (part.unsqueeze(0) for part in (u, step, a, b, c, skip))
    return scan_reference(one, dt, rates, inputs, outputs, through, reverse=(reverse,)).squeeze(0)


def _log_decay(step: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """dt·A of every channel and state: step [B, L, E] and A [E, N] -> [B, L, E·N]."""
    return (step.unsqueeze(-1) * a).flatten(-2)


def _heads_of_mamba2(
    mixer: Mamba2Directions, x: torch.Tensor, step: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dt [B, L, H], dt·A [B, L, H] and mean |dt·B| [B, L] of a direction; arguments as for the mixer's `_scan`."""
    _, (u,) = conv_silu(x, [getattr(mixer, f"conv1d{name}")], "reference")
    b = u.split([mixer.d_inner, mixer.d_state, mixer.d_state], -1)[1]
    dt = F.softplus(widen(step) + widen(getattr(mixer, f"dt_bias{name}")))
    return dt, -dt * widen(getattr(mixer, f"A_log{name}")).exp(), input_weight(dt, b)


def _mamba2(mixer: BidirectionalMamba2, hidden: torch.Tensor) -> Parts:
    rates, each = 2 * mixer.d_state, []
    z, x, bc, step = mixer.in_proj(hidden).split([mixer.d_inner, mixer.d_inner, rates, mixer.heads], -1)
    for name in mixer.directions:
        if name == "_b":
            bc, step = mixer.in_proj_b(hidden).split([rates, mixer.heads], -1)
            x, bc, step = x.flip(1), bc.flip(1), step.flip(1)
        inputs = torch.cat([x, bc], -1)
        y, inner = mixer._scan(inputs, step, name, name), _heads_of_mamba2(mixer, inputs, step, name)
        each.append((name, *((part.flip(1) for part in (y, *inner)) if name == "_b" else (y, *inner))))
    gate = F.silu(widen(z))
    gated = [widen(y) / len(each) * gate for _, y, *_ in each]
    # The norm divides the sum of the directions, so each of them is divided by the sum's length.
    scale = sum(gated).pow(2).mean(-1, keepdim=True).add(mixer.norm.eps).rsqrt() * widen(mixer.norm.weight)  # type: ignore
    flows = (
        Flow(NAMES[name], _project(mixer, y * scale), *inner) for (name, _, *inner), y in zip(each, gated, strict=True)
    )
    return Parts(gate, tuple(flows))


def _demansia2(mixer: DeMansia2Mixer, hidden: torch.Tensor) -> Parts:
    projected, flows, axis = mixer.in_proj(hidden), [], -1 if mixer.legacy else 1
    gate = F.silu(projected[..., : mixer.d_inner])
    for name in mixer.directions:
        back = name == "_b"
        read = projected.flip(axis) if back else projected
        output = mixer._output(read, name, "" if mixer.legacy else name) / len(mixer.directions)
        _, x, step = read.split([mixer.d_inner, mixer.d_inner + 2 * mixer.d_state, mixer.heads], -1)
        inner = _heads_of_mamba2(mixer, x, step, name)
        if back:
            output = output.flip(axis)
            inner = inner if mixer.legacy else tuple(part.flip(1) for part in inner)  # type: ignore[assignment]
        flows.append(Flow(NAMES[name], output, *inner))
    return Parts(gate, tuple(flows))


def _mamba3(mixer: BidirectionalMamba3, hidden: torch.Tensor) -> Parts:
    inner, flows = mixer.d_inner, []
    z, x, own = mixer.in_proj(hidden).split([inner, inner, sum(mixer._own_sizes())], -1)
    gate = F.silu(z)
    for name in mixer.directions:
        part, back = (mixer.in_proj_b(hidden) if name == "_b" else own), name == "_b"
        y = mixer._scan(x.flip(1), part.flip(1), name).flip(1) if back else mixer._scan(x, part, name)
        b, _, step, decay, _, _ = part.split(mixer._own_sizes(), -1)
        dt = F.softplus(widen(step) + widen(getattr(mixer, f"dt_bias{name}")))
        b = getattr(mixer, f"B_norm{name}")(b).unsqueeze(-2) + widen(getattr(mixer, f"B_bias{name}"))
        log_decay = -dt * heavy_tail(widen(decay)).clamp(min=LEAST_DECAY)
        weight = (dt * b.abs().mean(-1)).mean(-1)
        flows.append(Flow(NAMES[name], _project(mixer, y / len(mixer.directions) * gate), dt, log_decay, weight))
    return Parts(gate, tuple(flows))


def _mambavision(mixer: MambaVisionMixer, hidden: torch.Tensor) -> Parts:
    x, z = mixer.in_proj(hidden).mT.chunk(2, 1)
    x, z = F.silu(mixer.conv1d_x(x)).mT, F.silu(mixer.conv1d_z(z)).mT
    step, b, c = mixer.x_proj(x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
    a, delta = -torch.exp(widen(mixer.A_log)), mixer.dt_proj(step)
    dt = F.softplus(delta + widen(mixer.dt_proj.bias))  # the bias is added twice, as in the mixer
    y = _scanned(x, dt, a, b, c, widen(mixer.D), False)
    nothing = torch.zeros_like(z)
    scan, conv = _project(mixer, torch.cat([y, nothing], -1)), _project(mixer, torch.cat([nothing, z], -1))
    flows = Flow("forward", scan, dt, _log_decay(dt, a), input_weight(dt, b)), Flow("convolution", conv)
    return Parts(None, flows)


def _linear_attention(mixer: LinearAttentionMixer, hidden: torch.Tensor) -> Parts:
    x = mixer.in_proj(hidden)
    x, z = x.chunk(2, -1) if mixer.gated else (x, None)
    gate, flows = None if z is None else F.silu(z), []
    names = ("forward", "backward") if len(mixer.attentions) > 1 else ("attention",)
    for attention, name in zip(mixer.attentions, names, strict=True):
        back = name == "backward"
        read = x.flip(1) if back else x
        y = attention(read) * mixer.scale
        u = read if attention.conv1d is None else F.silu(attention.conv1d(read))  # type: ignore[operator]
        k = (F.elu(widen(attention.qk(u))) + 1).chunk(2, -1)[1]  # type: ignore[operator]
        gated = attention.gate is not None
        step = F.softplus(attention.gate_up(attention.gate(u))) if gated else None  # type: ignore[operator]
        weight = k.mean(-1) if step is None else input_weight(step, k)
        log_decay = None if attention.forget is None else -F.softplus(attention.forget(u))  # type: ignore[operator]
        results = Results(*(part.flip(1) if back else part for part in results_of_attention(attention, u)))  # type: ignore[arg-type]
        y, weight = (part.flip(1) if back else part for part in (y, weight))
        added = _project(mixer, y if gate is None else y * gate)
        flows.append(Flow(name, added, _turned(step, back), _turned(log_decay, back), weight, results))
    if mixer.mlp is not None:
        inner = mixer.mlp(hidden)
        flows.append(Flow("MLP", inner if mixer.gamma is None else inner * mixer.gamma))
    return Parts(gate, tuple(flows))


def _turned(part: torch.Tensor | None, back: bool) -> torch.Tensor | None:
    """Values [B, L, …] in running order, with the first token first."""
    return part.flip(1) if back and part is not None else part


def _gated_conv(mixer: GatedConv, hidden: torch.Tensor) -> Parts:
    return Parts(F.silu(mixer.in_proj(hidden).chunk(2, -1)[1]), (Flow("convolution", mixer(hidden)),))


READERS: dict[type, Callable[[Any, torch.Tensor], Parts]] = {
    BidirectionalMamba: _mamba,
    BidirectionalMamba2: _mamba2,
    DeMansia2Mixer: _demansia2,
    BidirectionalMamba3: _mamba3,
    MambaVisionMixer: _mambavision,
    LinearAttentionMixer: _linear_attention,
    GatedConv: _gated_conv,
}
