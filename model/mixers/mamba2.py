"""Mamba-2 mixers: a state per head with one decay, computed as matrix products (`model.ops.ssd`).

Legend: B images; L sequence length; D model width; E inner width; H heads; P head width; N state size.

Dao and Gu, "Transformers are SSMs" (2024). Parameters have the published names: `_b` marks the second direction, which
runs from the last token to the first.
"""

from __future__ import annotations

import math

import torch
import torch.fx
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from model.mixers.parts import direction_names, head_count, initial_step_bias, widen
from model.mixers.registry import register_mixer
from model.ops import ssd_scan
from model.ops.mixer_parts import conv_silu

NORM_EPS = 1e-5
A_LIMIT = 16.0  # -A is between 1 and this at the start of training

torch.fx.wrap("ssd_scan")  # not traced through: it checks shapes
torch.fx.wrap("widen")


class GatedNorm(nn.RMSNorm):
    """RMSNorm of y · silu(z), in at least float32."""

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """y and z [B, L, E] -> [B, L, E] in z's dtype."""
        gated = widen(y) * F.silu(widen(z))
        return F.rms_norm(gated, self.normalized_shape, widen(self.weight), self.eps).to(z.dtype)


class Mamba2Directions(nn.Module):
    """What is a direction's own in every Mamba-2 mixer: convolution, step sizes, decays and skip connection.

    Args:
        d_model: model width D.
        d_state: state size N.
        d_conv: taps of the causal convolution over x, B and C.
        expand: E / D.
        head_dim: P.
        directions: "both", or "forward" without the `_b` parameters.
        backend: "chunked", "reference", or "auto": the former.

    Raises:
        ModelError: unknown directions, or heads that do not fill the inner width.
    """

    def __init__(
        self, d_model: int, d_state: int, d_conv: int, expand: int, head_dim: int, directions: str, backend: str
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.head_dim, self.backend = expand * d_model, d_state, head_dim, backend
        self.heads = head_count(self.d_inner, head_dim)
        self.directions = direction_names(directions)
        channels = self.d_inner + 2 * d_state
        for name in self.directions:
            self.register_parameter(f"dt_bias{name}", nn.Parameter(initial_step_bias(self.heads)))
            decay = torch.empty(self.heads, dtype=torch.float32).uniform_(1, A_LIMIT)
            self.register_parameter(f"A_log{name}", nn.Parameter(decay.log()))
            self.register_parameter(f"D{name}", nn.Parameter(torch.ones(self.heads)))
            conv = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
            self.add_module(f"conv1d{name}", conv)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay: dt_bias, A_log and D of each direction."""
        return {f"{part}{name}" for name in self.directions for part in ("dt_bias", "A_log", "D")}

    def macs_per_token(self) -> dict[str, int]:
        """Nothing: all is torch's matrix products, which are counted where they run."""
        return {}

    def _scan(self, x: torch.Tensor, step: torch.Tensor, name: str, skip: str = "") -> torch.Tensor:
        """One direction, its first token first.

        Args:
            x: x, B and C before the convolution, [B, L, E + 2 N].
            step: step sizes before their bias, [B, L, H].
            name: of the direction.
            skip: name of the direction whose D is used.

        Returns:
            [B, L, E].
        """
        fused = "reference" if self.backend == "reference" else "auto"
        _, (u,) = conv_silu(x, [getattr(self, f"conv1d{name}")], fused)
        u, b, c = u.split([self.d_inner, self.d_state, self.d_state], -1)
        heads = u.unflatten(-1, (self.heads, self.head_dim))
        dt = F.softplus(widen(step) + widen(getattr(self, f"dt_bias{name}")))
        log_decay = -dt * widen(getattr(self, f"A_log{name}")).exp()
        inputs = (heads * dt.unsqueeze(-1)).to(heads.dtype)
        y = ssd_scan(inputs, log_decay, b.unsqueeze(-2), c.unsqueeze(-2), self.backend)
        return (y + heads * getattr(self, f"D{skip}").unsqueeze(-1).to(heads.dtype)).flatten(-2)


@register_mixer("mamba2")
@register_notrace_module
class BidirectionalMamba2(Mamba2Directions):
    """A Mamba-2 mixer in both directions, by the rule of `BidirectionalMamba`.

    The directions share x, the gate z, norm and output projection; B, C, step sizes, decays, skip connection and
    convolution are their own, and the mean of the two is gated. With "forward" it is the published Mamba-2 mixer.
    Arguments as in `Mamba2Directions`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        directions: str = "both",
        backend: str = "auto",
    ) -> None:
        super().__init__(d_model, d_state, d_conv, expand, head_dim, directions, backend)
        inner, own = self.d_inner, 2 * d_state + self.heads
        self.in_proj = nn.Linear(d_model, 2 * inner + own, bias=False)
        if len(self.directions) == 2:
            self.in_proj_b = nn.Linear(d_model, own, bias=False)
        self.norm = GatedNorm(inner, eps=NORM_EPS)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        rates = 2 * self.d_state
        z, x, bc, step = self.in_proj(hidden).split([self.d_inner, self.d_inner, rates, self.heads], -1)
        y = self._scan(torch.cat([x, bc], -1), step, "")
        if len(self.directions) == 2:
            bc, step = self.in_proj_b(hidden).split([rates, self.heads], -1)
            back = self._scan(torch.cat([x, bc], -1).flip(1), step.flip(1), "_b", "_b")
            y = (y + back.flip(1)) / 2
        return self.out_proj(self.norm(y, z))


@register_mixer("demansia2")
@register_notrace_module
class DeMansia2Mixer(Mamba2Directions):
    """DeMansia-2's mixer: one input projection; what follows is each direction's own, norm and output included.

    Arguments as in `Mamba2Directions`, and:

    Args:
        legacy: as published: the second direction reads the channels of the input projection backwards instead of the
            sequence, writes its own output channels backwards, and uses the first direction's D.
        depth: number of blocks of the model: at the start the second direction's output weights are divided by its
            square root, as the model does with the first's; None: not divided, as published.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 48,
        directions: str = "both",
        backend: str = "auto",
        legacy: bool = False,
        depth: int | None = None,
    ) -> None:
        super().__init__(d_model, d_state, d_conv, expand, head_dim, directions, backend)
        self.legacy = legacy
        inner = self.d_inner
        self.in_proj = nn.Linear(d_model, 2 * inner + 2 * d_state + self.heads, bias=False)
        for name in self.directions:
            self.add_module(f"norm{name}", GatedNorm(inner, eps=NORM_EPS))
            self.add_module(f"out_proj{name}", nn.Linear(inner, d_model, bias=False))
        if depth is not None and len(self.directions) == 2:
            self.out_proj_b.weight.data.div_(math.sqrt(depth))

    out_proj: nn.Linear
    out_proj_b: nn.Linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        projected = self.in_proj(hidden)
        out = self._output(projected, "", "")
        if len(self.directions) == 1:
            return out
        axis = -1 if self.legacy else 1
        back = self._output(projected.flip(axis), "_b", "" if self.legacy else "_b")
        return (out + back.flip(axis)) / 2

    def _output(self, projected: torch.Tensor, name: str, skip: str) -> torch.Tensor:
        """One direction, its first token first: [B, L, 2 E + 2 N + H] -> [B, L, D]; `skip`: whose D."""
        z, x, step = projected.split([self.d_inner, self.d_inner + 2 * self.d_state, self.heads], -1)
        y = getattr(self, f"norm{name}")(self._scan(x, step, name, skip), z)
        return getattr(self, f"out_proj{name}")(y)
