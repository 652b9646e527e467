"""Photographs to measure with: the user's, or drawn ones that take about as long to decode as real ones.

The time to decode a JPEG depends on its pixels and bytes. Drawn images have the size of ImageNet's, about 500×375, and
80 to 130 kB: smooth fields of color, with detail that is weaker the finer it is, and sensor noise.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from labeler.base.errors import InputError
from labeler.sources.folder_source import find_images

DRAWN, FOLDERS, QUALITY = 96, 4, 90
LONG, SHORT = 500, (333, 376)  # pixels; the short side is drawn from this range
COARSEST, OCTAVES, FALL = 2, 8, 0.66  # cells across the coarsest field; each finer one is weaker by this factor
CONTRAST = 48.0  # spread of the coarsest field, in levels of 255
GRAIN = (15.0, 38.0)  # spread of single pixels, in levels of 255, drawn for each picture


def prepare(images: Path | None, folder: Path) -> Path:
    """Returns the user's folder of photographs; without one, `folder`, filled with drawn images."""
    if images is not None:
        return images
    for number in range(DRAWN):
        path = folder / f"class{number % FOLDERS}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(np.random.default_rng(number))).save(path, quality=QUALITY)
    return folder


def draw(random: np.random.Generator) -> np.ndarray:
    """Draws an image, uint8 [h, w, 3], in portrait or landscape format."""
    width, height = LONG, int(random.integers(*SHORT))
    if random.random() < 0.25:
        width, height = height, width
    picture = np.full((height, width, 3), random.uniform(80, 170, 3), np.float32)
    for octave in range(OCTAVES):
        cells = COARSEST << octave
        # The fine detail of photographs is mostly luminance; only coarse fields are colored.
        planes = [_field(random, cells, width, height) for _ in range(3 if octave < 4 else 1)]
        picture += CONTRAST * FALL**octave * np.stack(planes if len(planes) == 3 else planes * 3, -1)
    picture += random.uniform(*GRAIN) * random.standard_normal((height, width, 1), np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _field(random: np.random.Generator, cells: int, width: int, height: int) -> np.ndarray:
    """Draws smooth noise, float32 [h, w], with about `cells` cells along each side."""
    coarse = random.standard_normal((cells, cells), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def copies_of(images: Path, folder: Path, copies: int) -> Path:
    """Fills `folder` with `copies` copies of all images, for longer epochs, and returns it."""
    for copy in range(copies):
        shutil.copytree(images, folder / str(copy))
    return folder


def about(images: Path, folder: Path, count: int) -> Path:
    """Fills `folder` with about `count` images, copies of a small set or an even choice of a large one; returns it."""
    found = find_images(images)
    keys = [key for i, key in enumerate(found.keys) if i not in found.problems]
    if not keys:
        raise InputError(
            "no image to measure with", got=f"none in {str(images)!r}", remedy="Give a folder of photographs."
        )
    if len(keys) <= count:
        return copies_of(images, folder, round(count / len(keys)))
    for i in np.linspace(0, len(keys) - 1, count).astype(int):
        (folder / keys[i]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / keys[i], folder / keys[i])
    return folder
