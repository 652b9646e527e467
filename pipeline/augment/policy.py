"""The operations of augmentation and how they are drawn: RandAugment in timm's notation, 3-Augment, color jitter.

Legend: B images; K operations in a row per image.

A new operation is a line of `OPERATIONS` here, its work on tensors in `kernels.py`, and the same with PIL in
`pipeline/backends/pil_backend.py`.

All random numbers are drawn here, as arrays on the host, for `pipeline.augment.kernels`. Geometric operations are
not applied one by one: they are multiplied into one affine map per image, which warps the label map as well.

Cubuk et al., "RandAugment" (2019); Touvron et al., "DeiT III" (2022); levels and ranges are timm's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from labeler.base.errors import InputError

# Kernels of `pipeline.augment.kernels`, by number. The geometric ones are part of the affine map.
KEEP, AUTOCONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD = range(7)
COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, BLUR = range(7, 12)
ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(12, 17)
GEOMETRIC = (ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y)

FULL_LEVEL = 10.0
HIGHEST = {"p": 1, "inc": 1}  # limits of numbers in the notation
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
class DrawnKernels:
    """The augmentation of a batch.

    Attributes:
        kernels: int64 [B, K]: kernels in order; KEEP for none.
        amounts: float64 [B, K]: their amounts.
        affine: float64 [B, 2, 3]: the geometric kernels, as maps from input to crop.
    """

    kernels: np.ndarray
    amounts: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class RandAugment:
    """RandAugment: random operations, each applied with a probability.

    Attributes:
        operations: Names of the operations to choose from.
        layers: Operations per image.
        prob: Probability of applying an operation.
        magnitude: Level, 0 to `max_magnitude`.
        magnitude_std: Standard deviation of normal noise on the level; inf: uniform from 0 to the level.
        max_magnitude: Highest level.
    """

    operations: tuple[str, ...] = PLAIN
    layers: int = 2
    prob: float = 0.5
    magnitude: float = FULL_LEVEL
    magnitude_std: float = 0.0
    max_magnitude: float = FULL_LEVEL

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws (kernels, amounts) of n images, both [n, layers]."""
        shape = (n, self.layers)
        chosen = rng.integers(0, len(self.operations), shape)
        applied = rng.random(shape) < self.prob
        sign = np.where(rng.random(shape) < 0.5, -1.0, 1.0)
        noise = rng.random(shape) if math.isinf(self.magnitude_std) else rng.standard_normal(shape)
        level = (
            self.magnitude * noise if math.isinf(self.magnitude_std) else self.magnitude + self.magnitude_std * noise
        )
        level = np.clip(level, 0, self.max_magnitude) / FULL_LEVEL
        kernels, amounts = np.full(shape, KEEP), np.zeros(shape)
        for i, name in enumerate(self.operations):
            here = (chosen == i) & applied
            kernels[here] = OPERATIONS[name][0]
            amounts[here] = OPERATIONS[name][1](level[here], sign[here])
        return kernels, amounts


@dataclass(frozen=True)
class ThreeAugment:
    """3-Augment: one of grayscale, solarize and blur (DeiT III); color jitter usually follows.

    Attributes:
        max_radius: Largest standard deviation of the blur, in pixels.
    """

    max_radius: float = 2.0

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws (kernels, amounts) of n images, both [n, 1]."""
        kernels = rng.choice([SOLARIZE, COLOR, BLUR], (n, 1))
        radius = rng.uniform(0.1, self.max_radius, (n, 1))
        return kernels, np.where(kernels == SOLARIZE, 128.0, np.where(kernels == COLOR, 0.0, radius))


@dataclass(frozen=True)
class ColorJitter:
    """Color jitter: brightness, contrast and saturation in random order.

    Attributes:
        amount: Each is changed by a factor from 1 − amount to 1 + amount.
    """

    amount: float

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws (kernels, amounts) of n images, both [n, 3]."""
        kernels = rng.permuted(np.tile([BRIGHTNESS, CONTRAST, COLOR], (n, 1)), axis=1)
        return kernels, rng.uniform(max(0.0, 1 - self.amount), 1 + self.amount, (n, 3))


Policy = RandAugment | ThreeAugment | ColorJitter


def create_policies(auto_augment: str | None, color_jitter: float) -> tuple[Policy, ...]:
    """Creates augmentation policies. As in timm, RandAugment replaces color jitter, 3-Augment does not.

    Args:
        auto_augment: timm's notation, such as "rand-m9-mstd0.5-inc1", "3a", "none" or None.
        color_jitter: Strength of color jitter; 0: none.

    Returns:
        The policies, in order.

    Raises:
        InputError: `auto_augment` is not a known policy.
    """
    jitter = (ColorJitter(color_jitter),) if color_jitter else ()
    if not auto_augment or auto_augment == "none":
        return jitter
    if auto_augment == "3a":
        return (ThreeAugment(), *jitter)
    return (parse_rand_augment(auto_augment),)


def parse_rand_augment(text: str) -> RandAugment:
    """Parses timm's notation of RandAugment.

    Args:
        text: "rand" and, joined by "-", m (magnitude), n (layers), p (probability), mstd, mmax, inc.

    Returns:
        The policy.

    Raises:
        InputError: A part is unknown, repeated or out of range.
    """
    head, *parts = text.split("-")
    numbers: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|p)(\d+(?:\.\d+)?|inf)|(mmax|inc|m|n)(\d+)", part)
        name, value = (match[1] or match[3], match[2] or match[4]) if match else (part, "nan")
        if head != "rand" or name in numbers or not float(value) <= HIGHEST.get(name, math.inf):
            head = ""
            break
        numbers[name] = float(value)
    if head != "rand" or numbers.get("n") == 0:
        raise InputError(
            "auto_augment is not understood",
            got=repr(text),
            expected='"3a", or "rand" with any of -m9 -n2 -p0.5 -mstd0.5 -mmax10 -inc1, each once',
        )
    std = numbers.get("mstd", 0.0)
    return RandAugment(
        INCREASING if numbers.get("inc") else PLAIN,
        int(numbers.get("n", 2)),
        numbers.get("p", 0.5),
        numbers.get("m", FULL_LEVEL),
        math.inf if std > 100 else std,
        numbers.get("mmax") or FULL_LEVEL,
    )


def draw_augmentation(policies: tuple[Policy, ...], n: int, rng: np.random.Generator) -> DrawnKernels:
    """Draws the augmentation of images; geometric operations become affine maps, with KEEP in their place.

    Args:
        policies: The policies, in order.
        n: Number of images.
        rng: Random number generator.

    Returns:
        The draws.
    """
    drawn = [policy.draw(n, rng) for policy in policies]
    kernels = np.concatenate([kernel for kernel, _ in drawn] or [np.zeros((n, 0), np.int64)], 1)
    amounts = np.concatenate([amount for _, amount in drawn] or [np.zeros((n, 0))], 1)
    geometric = np.isin(kernels, GEOMETRIC)
    affine = compose_geometric(np.where(geometric, kernels, KEEP), amounts)
    return DrawnKernels(np.where(geometric, KEEP, kernels), np.where(geometric, 0.0, amounts), affine)


def compose_geometric(kernels: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """Combines geometric kernels, applied one after the other, into affine maps.

    Rotations are counter-clockwise about the center, shears keep the upper left corner, shifts are shares of a side.

    Args:
        kernels: int64 [B, K]: geometric kernels or KEEP.
        amounts: float64 [B, K]: their amounts.

    Returns:
        float64 [B, 2, 3]: maps from input to crop, see `pipeline.geometry`.
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
        # The last operation comes first on the way back from the input to the crop.
        total = total @ step
    return total[:, :2]
