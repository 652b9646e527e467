"""The textures of the demo's classes.

Every texture takes coordinates in periods and answers in 0..1. `soft` is the width of a pixel in periods: edges are
ramps about one pixel wide, so that nothing flickers with the direction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Plane = np.ndarray  # float32 [h, w]


def ramp(distance: Plane, soft: float) -> Plane:
    """From 0 to 1 within a width of `soft` about a distance of 0."""
    return np.clip(distance / soft + 0.5, 0, 1)


def _line(x: Plane, width: float, soft: float) -> Plane:
    """Lines at the integers."""
    return ramp(width / 2 - np.abs(x - np.round(x)), soft)


def _to_lattice(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    """Offsets to the nearest point of a lattice of equilateral triangles of side 1."""
    row = v / np.float32(np.sqrt(3))
    (du, dv), (eu, ev) = (
        (u - shift - np.round(u - shift), np.float32(np.sqrt(3)) * (row - shift - np.round(row - shift)))
        for shift in (0.0, 0.5)
    )
    nearer = np.hypot(eu, ev) < np.hypot(du, dv)
    return np.where(nearer, eu, du), np.where(nearer, ev, dv)


def _bricks(u: Plane, v: Plane, soft: float) -> Plane:
    row = np.floor(v / 0.7)
    joint = _line(u / 1.4 + 0.5 * (row % 2), 0.13, soft / 1.4)
    return 1 - np.maximum(joint, _line(v / 0.7, 0.26, soft / 0.7))


def _checks(u: Plane, v: Plane, soft: float) -> Plane:
    return ramp(np.sin(np.pi * u / 0.75) * np.sin(np.pi * v / 0.75), 3 * soft)


def _crosses(u: Plane, v: Plane, soft: float) -> Plane:
    du, dv = np.abs(u - np.round(u)), np.abs(v - np.round(v))
    return ramp(np.minimum(0.36 - np.maximum(du, dv), 0.12 - np.minimum(du, dv)), soft)


def _dots(u: Plane, v: Plane, soft: float) -> Plane:
    du, dv = _to_lattice(u, v)
    return ramp(0.31 - np.hypot(du, dv), soft)


def _grid(u: Plane, v: Plane, soft: float) -> Plane:
    return np.maximum(_line(u, 0.22, soft), _line(v, 0.22, soft))


def _hexagons(u: Plane, v: Plane, soft: float) -> Plane:
    du, dv = _to_lattice(u / 1.2, v / 1.2)
    inner = np.maximum(np.abs(du), np.abs(du) / 2 + np.abs(dv) * np.float32(np.sqrt(3) / 2))
    return ramp(0.4 - inner, soft / 1.2)


def _rings(u: Plane, v: Plane, soft: float) -> Plane:
    du, dv = _to_lattice(u / 1.15, v / 1.15)
    return ramp(0.1 - np.abs(np.hypot(du, dv) - 0.32), soft / 1.15)


def _scales(u: Plane, v: Plane, soft: float) -> Plane:
    """Rows of overlapping discs that get lighter towards their rims."""
    u, v, soft = u / 1.4, v / 1.4, soft / 1.4
    pattern = np.zeros_like(u)
    first = np.floor(v / 0.5)
    for row in (first - 1, first):
        du = u - 0.5 * (row % 2)
        radius = np.hypot(du - np.round(du), v - 0.5 * row)
        inside = ramp(0.56 - radius, soft)
        pattern = pattern * (1 - inside) + inside * np.clip(radius / 0.5, 0, 1) ** 3
    return pattern


def _stripes(u: Plane, v: Plane, soft: float) -> Plane:
    return _line(u / 0.8, 0.5, soft / 0.8)


def _zigzag(u: Plane, v: Plane, soft: float) -> Plane:
    return _line((u + 1.1 * np.abs(v / 1.3 - np.round(v / 1.3))) / 0.85, 0.5, soft * 1.3)


TEXTURES: dict[str, Callable[[Plane, Plane, float], Plane]] = {
    "bricks": _bricks,
    "checks": _checks,
    "crosses": _crosses,
    "dots": _dots,
    "grid": _grid,
    "hexagons": _hexagons,
    "rings": _rings,
    "scales": _scales,
    "stripes": _stripes,
    "zigzag": _zigzag,
}
