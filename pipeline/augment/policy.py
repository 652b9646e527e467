"""Which augmentation each image gets: RandAugment in timm's notation, 3-Augment, colour jitter.

Legend: B images; K operations in a row per image.

Everything random is drawn here, as arrays, on the host; `augment_ops` carries it out. Geometric operations are not
carried out one by one: they are multiplied into one affine map per image, which bends the label map as well.

Cubuk et al., "RandAugment" (2019); Touvron et al., "DeiT III" (2022); levels and ranges are timm's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from labeler.base.errors import InputError

# Kernels of `augment_ops`, by number. The geometric ones are part of the affine map.
KEEP, AUTOCONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD = range(7)
COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, BLUR = range(7, 12)
ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(12, 17)
GEOMETRIC = (ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y)

FULL_LEVEL = 10.0
HIGHEST = {"p": 1, "inc": 1}  # of the notation's numbers
Amounts = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (level / FULL_LEVEL, a random sign) -> the kernel's amount


def _nothing(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.zeros_like(level)


def _bits(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.floor(level * 4)


def _threshold(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.minimum(256, np.floor(level * 256))


def _added(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.minimum(128, np.floor(level * 110))


def _factor(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return level * 1.8 + 0.1


def _factor_around_one(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.maximum(0.1, 1.0 + sign * level * 0.9)


def _degrees(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return sign * level * 30


def _shear(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return sign * level * 0.3


def _share_of_side(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return sign * level * 0.45


OPERATIONS: dict[str, tuple[int, Amounts]] = {
    "AutoContrast": (AUTOCONTRAST, _nothing),
    "Equalize": (EQUALIZE, _nothing),
    "Invert": (INVERT, _nothing),
    "Rotate": (ROTATE, _degrees),
    "Posterize": (POSTERIZE, _bits),
    "PosterizeIncreasing": (POSTERIZE, lambda level, sign: 4 - _bits(level, sign)),
    "Solarize": (SOLARIZE, _threshold),
    "SolarizeIncreasing": (SOLARIZE, lambda level, sign: 256 - _threshold(level, sign)),
    "SolarizeAdd": (SOLARIZE_ADD, _added),
    "Color": (COLOR, _factor),
    "ColorIncreasing": (COLOR, _factor_around_one),
    "Contrast": (CONTRAST, _factor),
    "ContrastIncreasing": (CONTRAST, _factor_around_one),
    "Brightness": (BRIGHTNESS, _factor),
    "BrightnessIncreasing": (BRIGHTNESS, _factor_around_one),
    "Sharpness": (SHARPNESS, _factor),
    "SharpnessIncreasing": (SHARPNESS, _factor_around_one),
    "ShearX": (SHEAR_X, _shear),
    "ShearY": (SHEAR_Y, _shear),
    "TranslateXRel": (TRANSLATE_X, _share_of_side),
    "TranslateYRel": (TRANSLATE_Y, _share_of_side),
}
# fmt: off
PLAIN = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
         "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
# fmt: on
INCREASING = tuple(name + "Increasing" if name + "Increasing" in OPERATIONS else name for name in PLAIN)


@dataclass(frozen=True)
class Draws:
    """Kernels int64 [B, K] in order, their amounts float64 [B, K]; the geometric ones as affine float64 [B, 2, 3]."""

    kernels: np.ndarray
    amounts: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations per image, each carried out with probability `prob`.

    magnitude       level 0 to 10 (or `max_magnitude`), with a normal noise of `magnitude_std`; inf: evenly from 0
    """

    operations: tuple[str, ...] = PLAIN
    layers: int = 2
    prob: float = 0.5
    magnitude: float = FULL_LEVEL
    magnitude_std: float = 0.0
    max_magnitude: float = FULL_LEVEL

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(kernels, amounts), both [n, layers]."""
        shape = (n, self.layers)
        chosen = rng.integers(0, len(self.operations), shape)
        carried_out = rng.random(shape) < self.prob
        sign = np.where(rng.random(shape) < 0.5, -1.0, 1.0)
        noise = rng.random(shape) if math.isinf(self.magnitude_std) else rng.standard_normal(shape)
        level = (
            self.magnitude * noise if math.isinf(self.magnitude_std) else self.magnitude + self.magnitude_std * noise
        )
        level = np.clip(level, 0, self.max_magnitude) / FULL_LEVEL
        kernels, amounts = np.full(shape, KEEP), np.zeros(shape)
        for i, name in enumerate(self.operations):
            here = (chosen == i) & carried_out
            kernels[here] = OPERATIONS[name][0]
            amounts[here] = OPERATIONS[name][1](level[here], sign[here])
        return kernels, amounts


@dataclass(frozen=True)
class ThreeAugment:
    """One of greyscale, solarize and blur (DeiT III); colour jitter usually follows."""

    max_radius: float = 2.0

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(kernels, amounts), both [n, 1]."""
        kernels = rng.choice([SOLARIZE, COLOR, BLUR], (n, 1))
        radius = rng.uniform(0.1, self.max_radius, (n, 1))
        return kernels, np.where(kernels == SOLARIZE, 128.0, np.where(kernels == COLOR, 0.0, radius))


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, each by a factor from 1 − amount to 1 + amount, in random order."""

    amount: float

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(kernels, amounts), both [n, 3]."""
        kernels = rng.permuted(np.tile([BRIGHTNESS, CONTRAST, COLOR], (n, 1)), axis=1)
        return kernels, rng.uniform(max(0.0, 1 - self.amount), 1 + self.amount, (n, 3))


Policy = RandAugment | ThreeAugment | ColorJitter


def create_policies(auto_augment: str | None, color_jitter: float) -> tuple[Policy, ...]:
    """The policies in their order; as in timm, RandAugment takes the place of colour jitter, 3-Augment does not.

    auto_augment  "rand-m9-mstd0.5-inc1" and the like, "3a", or None
    Raises InputError naming the part that is not understood.
    """
    jitter = (ColorJitter(color_jitter),) if color_jitter else ()
    if not auto_augment or auto_augment == "none":
        return jitter
    if auto_augment == "3a":
        return (ThreeAugment(), *jitter)
    return (parse_rand_augment(auto_augment),)


def parse_rand_augment(text: str) -> RandAugment:
    """timm's notation: "rand" and, joined by "-", m (magnitude), n (layers), p (probability), mstd, mmax, inc."""
    head, *parts = text.split("-")
    found: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|p)(\d+(?:\.\d+)?|inf)|(mmax|inc|m|n)(\d+)", part)
        name, value = (match[1] or match[3], match[2] or match[4]) if match else (part, "nan")
        if head != "rand" or name in found or not float(value) <= HIGHEST.get(name, math.inf):
            head = ""
            break
        found[name] = float(value)
    if head != "rand" or found.get("n") == 0:
        raise InputError(
            "auto_augment is not understood",
            got=repr(text),
            expected='"3a", or "rand" with any of -m9 -n2 -p0.5 -mstd0.5 -mmax10 -inc1, each once',
        )
    std = found.get("mstd", 0.0)
    return RandAugment(
        INCREASING if found.get("inc") else PLAIN,
        int(found.get("n", 2)),
        found.get("p", 0.5),
        found.get("m", FULL_LEVEL),
        math.inf if std > 100 else std,
        found.get("mmax") or FULL_LEVEL,
    )


def draw_augmentation(policies: tuple[Policy, ...], n: int, rng: np.random.Generator) -> Draws:
    """Draw for n images, one policy after the other; geometric operations end in `affine` and leave KEEP behind."""
    drawn = [policy.draw(n, rng) for policy in policies]
    kernels = np.concatenate([kernel for kernel, _ in drawn] or [np.zeros((n, 0), np.int64)], 1)
    amounts = np.concatenate([amount for _, amount in drawn] or [np.zeros((n, 0))], 1)
    geometric = np.isin(kernels, GEOMETRIC)
    affine = compose_geometric(np.where(geometric, kernels, KEEP), amounts)
    return Draws(np.where(geometric, KEEP, kernels), np.where(geometric, 0.0, amounts), affine)


def compose_geometric(kernels: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """float64 [B, 2, 3]: input -> crop (see `geometry`) of geometric kernels [B, K] carried out one after the other.

    Angles turn counter-clockwise about the centre; shears keep the upper left corner; shifts are shares of a side.
    """
    n, layers = kernels.shape
    total = np.tile(np.eye(3), (n, 1, 1))
    for k in range(layers):
        kernel, amount = kernels[:, k], amounts[:, k]
        step = np.tile(np.eye(3), (n, 1, 1))
        angle = np.radians(np.where(kernel == ROTATE, amount, 0.0))
        cos, sin = np.cos(angle), np.sin(angle)
        step[:, 0, 0], step[:, 0, 1], step[:, 0, 2] = cos, sin, (1 - cos - sin) / 2
        step[:, 1, 0], step[:, 1, 1], step[:, 1, 2] = -sin, cos, (1 - cos + sin) / 2
        step[:, 1, 0] += np.where(kernel == SHEAR_X, amount, 0.0)
        step[:, 0, 1] += np.where(kernel == SHEAR_Y, amount, 0.0)
        step[:, 1, 2] += np.where(kernel == TRANSLATE_X, amount, 0.0)
        step[:, 0, 2] += np.where(kernel == TRANSLATE_Y, amount, 0.0)
        # The last operation is the first on the way from the finished input back to the crop.
        total = total @ step
    return total[:, :2]
