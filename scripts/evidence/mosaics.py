"""Pictures put together of real ones: four to nine of CIFAR-10's in a picture, of different sizes.

A picture has several real objects, the largest one's class is its label, and where each lies is known. Train pictures
are made of train images, test pictures of test images. Drawn once, from a fixed seed, below one folder:

    OUT/train/<class>/<number>.png    OUT/truth/train/<class>/<number>.png    a byte per pixel: class id
    OUT/test/<class>/<number>.png     OUT/truth/test/<class>/<number>.png
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
PARTS = (4, 9)  # objects in a picture
SHORTEST = 14  # pixels of an object's shorter side
LARGER = 1.25  # the largest object's area, in areas of the second largest, at least
COUNTS = {"train": 4000, "test": 4000}

Box = tuple[int, int, int, int]  # y0, x0, y1, x1


def draw_all(images: Path, out: Path, counts: dict[str, int] | None = None) -> Path:
    """Draws the pictures of both splits, unless they are there.

    Args:
        images: folder of `train/CLASS` and `test/CLASS`.
        out: folder to write to; whole or not there.
        counts: pictures of each split.

    Returns:
        `out`.
    """
    if out.exists():
        return out
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for number, (split, count) in enumerate((counts or COUNTS).items()):
        draw_split(images / split, unfinished / split, unfinished / "truth" / split, count, seed=number)
    os.replace(unfinished, out)
    return out


def draw_split(images: Path, out: Path, truth: Path, count: int, seed: int) -> None:
    """Draws `count` pictures, as many of each class as the others."""
    generator = np.random.default_rng(seed)
    folders = sorted(images.iterdir())
    pools = [[np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())] for folder in folders]
    for index in range(count):
        label = index % len(folders)
        picture, classes = draw(pools, label, generator)
        for folder, pixels in ((out, picture), (truth, classes)):
            place = folder / folders[label].name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{index:05}.png")


def draw(pools: list[list[np.ndarray]], label: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws a picture.

    Args:
        pools: of each class, images [32, 32, 3].
        label: class of the largest object.
        generator: of all that is random in it.

    Returns:
        The picture, uint8 [SIDE, SIDE, 3], and the class of each pixel, uint8 [SIDE, SIDE].
    """
    picture, classes = np.empty((SIDE, SIDE, 3), np.uint8), np.empty((SIDE, SIDE), np.uint8)
    others = [id for id in range(len(pools)) if id != label]
    for number, box in enumerate(cut(generator)):
        chosen = label if number == 0 else int(generator.choice(others))
        pool = pools[chosen]
        y0, x0, y1, x1 = box
        picture[y0:y1, x0:x1] = fitted(pool[generator.integers(len(pool))], y1 - y0, x1 - x0, generator)
        classes[y0:y1, x0:x1] = chosen
    return picture, classes


def cut(generator: np.random.Generator) -> list[Box]:
    """Cuts the picture into boxes, the largest first, which is clearly larger than the second."""
    while True:
        boxes: list[Box] = [(0, 0, SIDE, SIDE)]
        wanted = generator.integers(PARTS[0], PARTS[1] + 1)
        while len(boxes) < wanted:
            sides = [max(y1 - y0, x1 - x0) for y0, x0, y1, x1 in boxes]
            if max(sides) < 2 * SHORTEST:
                break
            # Any box that can be cut, so that sizes differ more than if always the largest were.
            at = int(generator.choice([i for i, side in enumerate(sides) if side >= 2 * SHORTEST]))
            boxes[at : at + 1] = halves(boxes[at], generator)
        areas = [(y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in boxes]
        order = np.argsort(areas)[::-1]
        if len(boxes) >= PARTS[0] and areas[order[0]] >= LARGER * areas[order[1]]:
            return [boxes[i] for i in order]


def halves(box: Box, generator: np.random.Generator) -> list[Box]:
    """Cuts a box in two across its longer side."""
    y0, x0, y1, x1 = box
    if y1 - y0 >= x1 - x0:
        at = y0 + int(generator.integers(SHORTEST, y1 - y0 - SHORTEST + 1))
        return [(y0, x0, at, x1), (at, x0, y1, x1)]
    at = x0 + int(generator.integers(SHORTEST, x1 - x0 - SHORTEST + 1))
    return [(y0, x0, y1, at), (y0, at, y1, x1)]


def fitted(image: np.ndarray, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """The image's middle in the box's shape, resized to it; half of them mirrored."""
    side = len(image)
    scale = side / max(height, width)
    h, w = height * scale, width * scale
    # A box of one to three would leave a strip of the object: never less than half of the image is kept.
    h, w = max(h, side / 2), max(w, side / 2)
    top, left = (side - h) / 2, (side - w) / 2
    part = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    pixels = np.asarray(part)
    return pixels[:, ::-1] if generator.random() < 0.5 else pixels
