"""MILA's linear attention, with rotations of queries and keys by the place of a token.

Parameters have the published names.

Legend: B images; h×w grid of a stage, T = h·w tokens; C its width; H heads, d = C / H.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import nn
from torch.nn import functional as F

BASE = 10_000.0  # of the wavelengths of the rotations
LEAST = 1e-6  # added to the normalizer of the attention


def rotation_table(grid: tuple[int, int], width: int, like: torch.Tensor) -> torch.Tensor:
    """Rotations of pairs of channels by the place of a token: by its row for the first half of them, then its column.

    Args:
        grid: h, w.
        width: C; a multiple of 4.
        like: a tensor of the wanted device and dtype.

    Returns:
        [h, w, C / 2, 2]: cosine and sine of each pair's angle.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    count = width // 4
    frequencies = BASE ** -(torch.arange(count, device=like.device, dtype=dtype) / count)
    rows, columns = (torch.arange(side, device=like.device, dtype=dtype).unsqueeze(-1) * frequencies for side in grid)
    sides = rows.unsqueeze(1).expand(*grid, count), columns.unsqueeze(0).expand(*grid, count)
    angles = torch.cat(sides, -1)
    return torch.stack([angles.cos(), angles.sin()], -1).to(like.dtype)


@torch.fx.wrap
def table_for(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`table`, or the rotations of another grid, computed. Sides that an exporter leaves open fit no table."""
    known = isinstance(height, int) and isinstance(width, int)
    if known and table.shape[:2] == (height, width):
        return table
    return rotation_table((height, width), 2 * table.shape[2], table)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn neighboring channels of x [B, h, w, C] by the angles of `table` [h, w, C / 2, 2]."""
    one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([one * cos - other * sin, one * sin + other * cos], -1).flatten(-2)


def linear_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, turned: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Each query's mean of the values, weighted by the products of its turned features with the turned keys'.

    Linear in T: the products of keys and values are summed before a query sees them.

    Args:
        queries: [B, H, T, d], not negative; for the normalizer.
        keys: [B, H, T, d], not negative; for the normalizer.
        values: [B, H, T, d].
        turned: queries and keys after rotation.

    Returns:
        [B, H, T, d].
    """
    count = keys.shape[2]
    wide = torch.promote_types(queries.dtype, torch.float32)  # a sum of C products, whose inverse is needed
    total = (queries.to(wide) * keys.to(wide).mean(2, keepdim=True)).sum(-1, keepdim=True) + LEAST
    summed = (turned[1] * count**-0.5).mT @ (values * count**-0.5)  # two factors: 1 / T is too small for float16
    return (turned[0] @ summed) / total.to(values.dtype)


def linear_attention_reference(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, turned: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """`linear_attention` by the whole matrix of weights [B, H, T, T]."""
    count = keys.shape[2]
    weights = turned[0] @ turned[1].mT / count
    return weights @ values / ((queries @ keys.mT / count).sum(-1, keepdim=True) + LEAST)


def on_map(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to x [B, h, w, C], which it reads as a map in channels-last order."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Rotations(nn.Module):
    """The rotations of one grid, which published files hold; those of other grids are computed.

    A state dict's rotations of another grid are passed over: they are a function of the grid.
    """

    rotations: torch.Tensor

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("rotations", rotation_table(grid, width, torch.empty(0)))

    def resize(self, grid: tuple[int, int]) -> None:
        """Hold the rotations of another grid."""
        self.rotations = rotation_table(grid, self.width, self.rotations)

    def forward(self, height: int, width: int) -> torch.Tensor:
        """[h, w, C / 2, 2]."""
        return table_for(self.rotations, height, width)

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        key = f"{prefix}rotations"
        if key in state_dict and state_dict[key].shape[2:] == self.rotations.shape[2:] != ():
            same = state_dict[key].shape == self.rotations.shape
            state_dict = {**state_dict, key: state_dict[key] if same else self.rotations}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class LinearAttention(nn.Module):
    """Linear attention with positions: rotations of queries and keys, and a convolution of the values.

    The rotations run through all channels before they are divided among the heads. The values are the input.

    Args:
        width: C.
        num_heads: H.
        grid: h, w of the rotations that are kept.
        qkv_bias: whether queries and keys have a bias.
    """

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int], qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.lepe = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.rope = Rotations(grid, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, h, w, C] -> [B, h, w, C]."""
        height, width = x.shape[1], x.shape[2]
        table = self.rope(height, width)
        queries, keys = (F.elu(self.qk(x)) + 1).chunk(2, -1)
        turned = self._heads(rotate(queries, table)), self._heads(rotate(keys, table))
        y = linear_attention(self._heads(queries), self._heads(keys), self._heads(x), turned)
        return y.transpose(1, 2).flatten(2).unflatten(1, (height, width)) + on_map(self.lepe, x)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, h, w, C] -> [B, H, T, C / H]."""
        return x.flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
