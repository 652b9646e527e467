"""MixToken: a box of the token grid in which image b is replaced by its partner, image B−1−b.

Legend: B images; S input side; h×w token grid, T = h·w.

Jiang et al., "All Tokens Matter" (2021); the box is drawn as in CutMix (Yun et al., 2019), in tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from labeler.base.errors import InputError


@dataclass(frozen=True)
class MixBox:
    """The box: tokens y0 ≤ y < y1, x0 ≤ x < x1 come from the partner.

    Attributes:
        y0: First row.
        x0: First column.
        y1: Row after the last.
        x1: Column after the last.
        lam: Share of tokens outside of the box.
    """

    y0: int
    x0: int
    y1: int
    x1: int
    lam: float

    def mask(self, grid: tuple[int, int], device: torch.device | str = "cpu") -> torch.Tensor:
        """Returns bool [T]: the tokens inside of the box, computed on `device`; `grid`: h, w."""
        y, x = (torch.arange(side, device=device) for side in grid)
        rows, columns = (y >= self.y0) & (y < self.y1), (x >= self.x0) & (x < self.x1)
        return (rows[:, None] & columns).flatten()


def sample_mix_box(grid: tuple[int, int], alpha: float, generator: torch.Generator | None = None) -> MixBox:
    """Draws a box: its share of the grid from Beta(alpha, alpha), its center uniformly; it is clipped to the grid.

    Args:
        grid: h, w in tokens.
        alpha: Parameter of the Beta distribution.
        generator: A CPU generator; None: torch's global one.

    Returns:
        The box.

    Raises:
        InputError: `alpha` is not positive.
    """
    if not alpha > 0:
        raise InputError("mix_alpha must be positive", got=alpha, remedy='Use mix="none" to turn mixing off.')
    h, w = grid
    # Beta(a, a) as a ratio of two Gamma(a, 1), since torch's public distributions take no generator.
    shape = torch.full((2,), float(alpha), dtype=torch.float64, device="cpu")
    first, second = torch._standard_gamma(shape, generator).tolist()
    share = second / (first + second) if first + second > 0 else 0.5
    cut = math.sqrt(share)
    y, x = (int(torch.randint(n, (), generator=generator, device="cpu")) for n in (h, w))
    half_y, half_x = int(h * cut) // 2, int(w * cut) // 2
    y0, y1 = max(y - half_y, 0), min(y + half_y, h)
    x0, x1 = max(x - half_x, 0), min(x + half_x, w)
    return MixBox(y0, x0, y1, x1, 1 - (y1 - y0) * (x1 - x0) / (h * w))


def mix_pixels(images: torch.Tensor, mix: MixBox, patch: tuple[int, int]) -> torch.Tensor:
    """Replaces the box's patches of each image with those of its partner.

    Args:
        images: [B, 3, S, S]; they are not changed.
        mix: The box, in patches.
        patch: Height and width of a patch in pixels.

    Returns:
        The mixed images [B, 3, S, S].
    """
    rows = slice(mix.y0 * patch[0], mix.y1 * patch[0])
    columns = slice(mix.x0 * patch[1], mix.x1 * patch[1])
    mixed = images.clone()
    mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
    return mixed
