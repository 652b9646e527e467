"""Linear attention as a mixer, with each of the six designs by which Mamba differs from it as an option.

Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective" (2024), names them: input gate, forget gate,
shortcut, no normalization, a single head, and the block.

Legend: B images; L sequence length; D model width; E inner width; H heads; N state size: width of a head's queries and
keys; P = E / H, that of its values; R rank of the input gate.
"""

from __future__ import annotations

import math

import torch
import torch.fx
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model.mixers.gated_conv import TokenConv
from model.mixers.mamba import StepSize
from model.mixers.parts import direction_names, initial_step_bias, widen
from model.mixers.registry import register_mixer

CHUNK = 64  # tokens whose weights are one matrix
LEAST = 1e-6  # added to the normalizer
BASE = 10_000.0  # of the wavelengths of the rotations
FORGETTING = ("decay", "rotary", "none")
BLOCKS = ("mamba", "transformer")

torch.fx.wrap("widen")


def attend_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """Sum of the values, weighted by the products of keys and queries, token by token.

    Args:
        q: queries [B, H, L, N].
        k: keys [B, H, L, N].
        v: values [B, H, L, P].
        log_decay: [B, H, L], logarithm of what a step keeps of the state, for causal attention; None: all.
        causal: whether a token sees only itself and those before it.

    Returns:
        [B, H, L, P].
    """
    if not causal:
        return (q @ k.mT) @ v
    state, outputs = torch.zeros_like(k[:, :, 0].unsqueeze(-1) * v[:, :, :1]), []
    for t in range(q.shape[2]):
        kept = state if log_decay is None else state * log_decay[:, :, t].exp()[..., None, None]
        state = kept + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        outputs.append((q[:, :, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 2)


@torch.fx.wrap
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """`attend_reference` as a few matrix products: of chunks of the sequence, and of states between them."""
    if not causal:
        return q @ (k.mT @ v)
    state, outputs = None, []
    for start in range(0, q.shape[2], CHUNK):
        own = slice(start, start + CHUNK)
        queries, keys, values = q[:, :, own], k[:, :, own], v[:, :, own]
        weights = queries @ keys.mT
        later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        if log_decay is None:
            weights, last = weights.masked_fill(later, 0), None
        else:
            kept = log_decay[:, :, own].cumsum(-1)  # logarithm of what is left of the state before the chunk
            between = (kept.unsqueeze(-1) - kept.unsqueeze(-2)).masked_fill(later, -torch.inf)
            weights, last = weights * between.exp(), kept[..., -1:]
            queries, keys = queries * kept.exp().unsqueeze(-1), keys * (last - kept).exp().unsqueeze(-1)
        outputs.append(weights @ values if state is None else weights @ values + queries @ state)
        before = 0 if state is None else state if last is None else state * last.exp().unsqueeze(-1)
        state = before + keys.mT @ values
    return torch.cat(outputs, 2)


@torch.fx.wrap
def rotate_along(x: torch.Tensor) -> torch.Tensor:
    """Turn neighboring channels of x [B, L, C] by angles that grow along the sequence."""
    count = x.shape[-1] // 2
    frequencies = BASE ** -(torch.arange(count, device=x.device, dtype=x.dtype) / count)
    angles = torch.arange(x.shape[1], device=x.device, dtype=x.dtype).unsqueeze(-1) * frequencies
    one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([one * cos - other * sin, one * sin + other * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Linear attention of one direction: from the first token to the last, or of all tokens to all.

    The values are its input, behind the convolution. All is computed in at least float32; autocast narrows matrix
    products alone.

    Args:
        inner: E.
        num_heads: H.
        d_state: N.
        d_conv: taps of the convolution; 0: none.
        rank: R; 0: no input gate.
        forget_gate: as in `LinearAttentionMixer`.
        shortcut: as there.
        normalize: as there.
        causal: from the first token to the last.
        reference: use `attend_reference`.
    """

    def __init__(
        self, inner: int, num_heads: int, d_state: int, d_conv: int, rank: int, forget_gate: str, shortcut: bool,
        normalize: bool, causal: bool, reference: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.rotary, self.normalize, self.causal = num_heads, forget_gate == "rotary", normalize, causal
        self.reference = reference
        self.conv1d = TokenConv(inner, d_conv, causal) if d_conv else None
        self.qk = nn.Linear(inner, 2 * num_heads * d_state)
        self.gate = nn.Linear(inner, rank, bias=False) if rank else None
        self.gate_up = StepSize(rank, inner) if rank else None
        self.forget = StepSize(inner, num_heads) if forget_gate == "decay" else None
        self.D = nn.Parameter(torch.ones(inner)) if shortcut else None
        if self.gate_up is not None:
            nn.init.zeros_(self.gate_up.bias)
        if self.forget is not None:  # 10 to 1,000 steps until a state is a third of itself
            with torch.no_grad():
                self.forget.bias.copy_(initial_step_bias(num_heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, E] -> [B, L, E]."""
        x = x if self.conv1d is None else F.silu(self.conv1d(x))
        q, k = (F.elu(widen(self.qk(x))) + 1).chunk(2, -1)  # not negative, as the normalizer needs
        wide = widen(x)
        v = wide if self.gate is None or self.gate_up is None else wide * F.softplus(self.gate_up(self.gate(x)))
        log_decay = None if self.forget is None else -F.softplus(self.forget(x)).mT
        turned = (rotate_along(q), rotate_along(k)) if self.rotary else (q, k)
        function = attend_reference if self.reference else attend
        y = function(self._heads(turned[0]), self._heads(turned[1]), self._heads(v), log_decay, self.causal)
        if self.normalize:
            ones = torch.ones_like(y[..., :1])
            y = y / (function(self._heads(q), self._heads(k), ones, log_decay, self.causal) + LEAST)
        else:
            y = y / x.shape[1]
        y = y.transpose(1, 2).flatten(2)
        return y if self.D is None else y + self.D * wide

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, H·n] -> [B, H, L, n]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


@register_mixer("linear_attention")
@register_notrace_module
class LinearAttentionMixer(nn.Module):
    """Linear attention in Mamba's block or beside an MLP.

    Mamba's own designs are `input_gate=True, forget_gate="decay", shortcut=True, normalize=False, num_heads=1,
    block="mamba"`; those of a linear transformer `False, "none", False, True, None, "transformer"`. The defaults are
    MILA's: of Mamba's designs the block, and rotations for the forget gate.

    Attention without a forget gate sees all tokens at once and has no direction. With `forget_gate="decay"` it runs
    forward and, with parameters of its own, backward.

    Args:
        d_model: model width D.
        d_state: state size N.
        d_conv: taps of the convolution in Mamba's block, see `TokenConv`.
        expand: E / D.
        dt_rank: R; None: D / 16, rounded up.
        directions: "both", or "forward": each token sees itself and those before it.
        halve: average the two directions instead of adding them.
        layer_scale: initial factor of each output channel; None: none.
        input_gate: multiply the values by a positive factor for each channel, computed from the token (Mamba's step).
        forget_gate: "decay": each step keeps a part of the state, computed from the token for each head; "rotary":
            rotations of queries and keys by their places; "none".
        shortcut: add D · x.
        normalize: divide by the sum of the weights; otherwise by L.
        num_heads: H; None: one for 64 channels.
        block: "mamba": a convolution in front, a gate behind; "transformer": neither, but an MLP beside the attention,
            with as many parameters as they. (In a transformer it would follow; a mixer is one branch of its block.)
        backend: "reference" goes token by token; any other name takes chunks.

    Raises:
        ModelError: an unknown forget_gate, block or direction, or heads that do not divide E or make N · H odd.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        directions: str = "both",
        halve: bool = True,
        layer_scale: float | None = None,
        input_gate: bool = False,
        forget_gate: str = "rotary",
        shortcut: bool = False,
        normalize: bool = True,
        num_heads: int | None = None,
        block: str = "mamba",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        inner = expand * d_model
        heads = max(1, inner // 64) if num_heads is None else num_heads
        forward = len(direction_names(directions)) == 1
        if forget_gate not in FORGETTING or block not in BLOCKS:
            raise ModelError(
                "unknown design", got=f"forget_gate={forget_gate!r}, block={block!r}",
                expected=f"forget_gate one of {', '.join(FORGETTING)}, block one of {', '.join(BLOCKS)}",
            )  # fmt: skip
        if heads < 1 or inner % heads or d_state < 1 or (forget_gate == "rotary" and heads * d_state % 2):
            raise ModelError(
                "the heads do not fit", got=f"num_heads={heads}, d_state={d_state} for {inner} channels",
                expected="a divisor of the channels, and an even number of rotated channels",
            )  # fmt: skip
        self.gated = block == "mamba"
        both = forget_gate == "decay" and not forward
        self.scale = 0.5 if both and halve else 1.0
        rank = (dt_rank or math.ceil(d_model / 16)) if input_gate else 0
        self.in_proj = nn.Linear(d_model, (2 if self.gated else 1) * inner, bias=False)
        self.attentions = nn.ModuleList(
            Attention(
                inner, heads, d_state, d_conv if self.gated else 0, rank, forget_gate, shortcut, normalize,
                causal=forward or both, reference=backend == "reference",
            )
            for _ in range(2 if both else 1)
        )  # fmt: skip
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        hidden = inner // 2
        self.mlp = (
            None if self.gated else nn.Sequential(nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, d_model))
        )
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((d_model,), layer_scale))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = self.in_proj(hidden)
        x, z = x.chunk(2, -1) if self.gated else (x, None)
        y = self.attentions[0](x)
        if len(self.attentions) > 1:
            y = (y + self.attentions[1](x.flip(1)).flip(1)) * self.scale
        y = y if z is None else y * F.silu(z)
        out = self.out_proj(y.to(x.dtype))
        out = out if self.mlp is None else out + self.mlp(hidden)
        return out if self.gamma is None else out * self.gamma

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay: D."""
        return {name for name, _ in self.named_parameters() if name.endswith(".D")}

    def macs_per_token(self) -> dict[str, int]:
        """Nothing: all is torch's, which is counted where it runs."""
        return {}
