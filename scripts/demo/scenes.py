"""Scenes for the demo: textured objects on a cluttered background, and the true class of every pixel.

The class is the texture alone; shape, colour, scale, place and direction are nuisance. A scene holds two or three
objects of different classes, one of them `LARGEST` times the size of the others; its class is the image's label.

    OUT/train/<class>/<name>.jpg    OUT/truth/train/<class>/<name>.png    a byte per pixel: class id, 255 is background
    OUT/test/<class>/<name>.jpg     OUT/truth/test/<class>/<name>.png
    OUT/classes.txt                 OUT/scenes.json                       the parameters, and whether all was written

    python -m scripts.demo.scenes OUT --train 2000 --test 1000 --seed 0
"""

import argparse
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from labeler.base.cores import usable_cores
from labeler.base.errors import InputError
from scripts.demo.textures import TEXTURES, Plane, ramp

SIDES = (72, 110)  # pixels, both ends included
LARGEST = 1.45  # ratio of the sizes, a size being the square root of the area
PERIOD = (8.5, 12)  # pixels from one element of a texture to the next, roughly
UPRIGHT = np.radians(18)  # most textures lean no further than this ...
TURNED = 0.3  # ... and this share lies in any direction
LIGHT = 0.9  # share of the textures whose pattern is lighter than its ground
CONTRAST = 0.35  # least difference in lightness, in 0..1, between the two
SCRAPS = (10, 20)  # pieces of clutter
GRAIN = 0.015  # spread of the noise of single pixels, in 0..1
BACKGROUND = 255  # in the truth
RENDERER = 2  # increase with any change to the pictures: stored sets of another number are rendered again
SPLITS = ("train", "test")
CLASSES = tuple(sorted(TEXTURES))
COLORS = (
    "f2efe6 e9dcc3 f6d55c f2b134 f28e6b e4572e c8443f e07a9a b35a8f 7c5295 5b6ee1 3a7ca5 2f4b7c 6ec5e9 4fb0ae 2a9d8f "
    "7bb662 4c8c4a 2e5e4e a67c52 7a5230 8d99ae 5c677d 22263a"
)
PALETTE = np.array([[int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)] for color in COLORS.split()], np.float32)
LIGHTNESS = PALETTE @ np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Scene:
    """One picture. `image` uint8 [h, w, 3]; `truth` uint8 [h, w], a class id or 255; `label` in 0..9."""

    image: np.ndarray
    truth: np.ndarray
    label: int


@dataclass(frozen=True)
class SceneSet:
    """A complete set on disk; `train` and `test` are its numbers of pictures."""

    root: Path
    train: int
    test: int
    seed: int
    classes: tuple[str, ...]

    def truth(self, split: str, key: str) -> np.ndarray:
        """uint8 [h, w] for a picture's path below its image root."""
        with Image.open((self.root / "truth" / split / key).with_suffix(".png")) as picture:
            return np.asarray(picture)


def render_scene(rng: np.random.Generator, label: int | None = None) -> Scene:
    """A scene drawn from `rng` alone; `label` in 0..9 sets the class of the largest object."""
    height, width = (int(side) for side in rng.choice(np.arange(SIDES[0], SIDES[1] + 1), 2, replace=False))
    classes = list(rng.permutation(len(CLASSES))[: rng.integers(2, 4)])
    if label is not None:
        classes = [label, *(other for other in classes if other != label)][: len(classes)]
    while (layout := _layout(rng, len(classes), height, width)) is None:
        pass
    image = _background(rng, height, width)
    truth = np.full((height, width), BACKGROUND, np.uint8)
    for (top, left, cover), class_id in zip(layout, classes, strict=True):
        box = (slice(top, top + len(cover)), slice(left, left + len(cover)))
        image[box] += cover[..., None] * (_paint(rng, CLASSES[class_id], len(cover)) - image[box])
        truth[box][cover >= 0.5] = class_id
    image *= 1 + 0.08 * _noise(rng, height, width, 3)[..., None]
    image += GRAIN * rng.standard_normal(image.shape, dtype=np.float32)
    return Scene((255 * np.clip(image, 0, 1)).astype(np.uint8), truth, int(classes[0]))


def _layout(rng: np.random.Generator, count: int, height: int, width: int) -> list[tuple[int, int, Plane]] | None:
    """Top, left and coverage of each object, the largest first, without overlap; None: they did not fit."""
    size = rng.uniform(0.42, 0.52) * min(height, width)
    taken = np.zeros((height, width), bool)
    placed: list[tuple[int, int, Plane]] = []
    for rank in range(count):
        cover = _shape(rng, size if rank == 0 else size / LARGEST)
        side = len(cover)
        if side > min(height, width):
            return None
        for _ in range(30):
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            below = taken[top : top + side, left : left + side]
            if not (below & (cover > 0)).any():
                break
        else:
            return None
        below |= cover > 0
        placed.append((top, left, cover))
    return placed


def _shape(rng: np.random.Generator, size: float) -> Plane:
    """Coverage in 0..1 of a random shape of area size²: [n, n] with n odd."""
    edge, turn = _edge(rng), rng.uniform(0, 2 * np.pi)
    around = edge(np.linspace(-np.pi, np.pi, 720, endpoint=False))
    radius = size / np.sqrt(np.pi * np.mean(around**2))
    reach = int(np.ceil(radius * around.max())) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    angle = np.arctan2(y, x) + np.float32(turn)
    return ramp(radius * edge(angle) - np.hypot(x, y), 1.0).astype(np.float32)


def _edge(rng: np.random.Generator) -> Callable[[Plane], Plane]:
    """The distance of a random shape's edge from its middle, in any unit, for a direction in radians."""
    kind = rng.integers(3)
    if kind == 0:  # between an ellipse and a rounded rectangle
        power, aspect = rng.uniform(2, 6), rng.uniform(0.65, 1)
        return lambda a: (np.abs(np.cos(a)) ** power + np.abs(np.sin(a) / aspect) ** power) ** (-1 / power)
    if kind == 1:  # regular polygon
        part = 2 * np.pi / rng.integers(3, 8)
        return lambda a: 1 / np.cos(a - part * np.round(a / part))
    waves = [(n, rng.uniform(-0.3, 0.3) / np.sqrt(n), rng.uniform(0, 2 * np.pi)) for n in range(2, 6)]
    return lambda a: 1 + sum(height * np.cos(n * a + phase) for n, height, phase in waves)


def _paint(rng: np.random.Generator, name: str, side: int) -> np.ndarray:
    """float32 [side, side, 3] in 0..1: a texture of random scale, direction and offset, in two distinct colors."""
    turn = rng.uniform(-np.pi, np.pi) if rng.random() < TURNED else rng.uniform(-UPRIGHT, UPRIGHT)
    period, shift = rng.uniform(*PERIOD), rng.uniform(0, 10, 2)
    y, x = np.mgrid[:side, :side].astype(np.float32) / np.float32(period)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = cos * x + sin * y + np.float32(shift[0]), cos * y - sin * x + np.float32(shift[1])
    one = rng.integers(len(PALETTE))
    other = rng.choice(np.flatnonzero(np.abs(LIGHTNESS - LIGHTNESS[one]) > CONTRAST))
    dark, light = sorted((one, other), key=LIGHTNESS.__getitem__)
    ground, ink = (dark, light) if rng.random() < LIGHT else (light, dark)
    return PALETTE[ground] + TEXTURES[name](u, v, 1 / period)[..., None] * (PALETTE[ink] - PALETTE[ground])


def _noise(rng: np.random.Generator, height: int, width: int, cells: int) -> Plane:
    """Smooth noise of mean 0 and spread about 1, `cells` bumps across."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 [height, width, 3] in 0..1: a blend of two muted colors with flat patches on it."""
    colors = PALETTE[rng.integers(len(PALETTE), size=12)]
    muted = 0.55 * colors + 0.45 * colors.mean(axis=1, keepdims=True)
    melt = ramp(_noise(rng, height, width, 4), 3.0)[..., None]
    ground = 255 * (muted[1] + melt * (muted[0] - muted[1]))
    # Drawn at twice the size and halved: the drawing routines do not smooth edges themselves.
    canvas = Image.fromarray(ground.astype(np.uint8)).resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(*SCRAPS, endpoint=True)):
        r, g, b = (int(c) for c in 255 * muted[rng.integers(2, 12)])
        _scrap(rng, draw, (r, g, b), rng.uniform(0, 2 * width), rng.uniform(0, 2 * height))
    return np.asarray(canvas.reduce(2), np.float32) / 255


def _scrap(rng: np.random.Generator, draw: ImageDraw.ImageDraw, fill: tuple[int, int, int], x: float, y: float) -> None:
    size, turn, kind = rng.uniform(5, 22), rng.uniform(0, np.pi), rng.integers(4)
    dx, dy = size * np.cos(turn), size * np.sin(turn)
    pen = int(rng.integers(2, 6))
    if kind == 0:
        for step in range(rng.integers(1, 4)):
            ox, oy = -0.45 * step * dy, 0.45 * step * dx
            draw.line((x - dx + ox, y - dy + oy, x + dx + ox, y + dy + oy), fill=fill, width=pen)
    elif kind == 1:
        draw.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=fill)
    elif kind == 2:
        draw.ellipse((x - size, y - size, x + size, y + size), outline=fill, width=pen)
    else:
        flat = 0.6
        draw.polygon((x - dx, y - dy, x - flat * dy, y + flat * dx, x + dx, y + dy, x + flat * dy, y - flat * dx), fill)


def cell_truth(truth: np.ndarray, grid: int | tuple[int, int]) -> np.ndarray:
    """The class id that fills more than half of each cell, or -1 (background, mixed, no pixel): int64 [H, W].

    The grid's cells are equal areas of the picture uint8 [h, w]; a pixel belongs to the cell that its centre lies in.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    (height, width), kinds = truth.shape, BACKGROUND + 1
    row = (2 * np.arange(height) + 1) * rows // (2 * height)
    column = (2 * np.arange(width) + 1) * columns // (2 * width)
    cell = row[:, None] * columns + column
    counts = np.bincount((cell * kinds + truth).ravel(), minlength=rows * columns * kinds).reshape(rows, columns, kinds)
    most = counts[..., :BACKGROUND].argmax(-1)
    held = counts[..., :BACKGROUND].max(-1)
    return np.where(2 * held > counts.sum(-1), most, -1)


def map_accuracy(top1: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Of the object cells of a picture: how many the map names rightly, and how many there are.

    `top1` is int [H, W], the class ids of a map over the whole picture; `truth` is uint8 [h, w].
    """
    cells = cell_truth(truth, top1.shape)
    return int((cells == top1)[cells >= 0].sum()), int((cells >= 0).sum())


def generate_scenes(
    out: Path, train: int, test: int, seed: int, progress: bool, workers: int | None = None
) -> SceneSet:
    """Write a set below `out`; a complete one of the same parameters is left as it is, one of others is replaced.

    Scene number i of a split depends on the seed, the split and i alone, so neither the other number nor `workers`
    (processes; by default one for each core, or none for a small set) changes a byte of it. Its label is i modulo 10.
    """
    if train < 1 or test < 1 or seed < 0:
        raise InputError(
            "scenes need pictures in both splits and a seed of 0 or more",
            got=f"train {train}, test {test}, seed {seed}",
            expected="train >= 1, test >= 1, seed >= 0",
        )
    out = Path(out)
    found = SceneSet(out, train, test, seed, CLASSES)
    wanted = {"renderer": RENDERER, "train": train, "test": test, "seed": seed}
    if _recorded(out) == {**wanted, "complete": True} and _all_there(found):
        return found
    record = out / "scenes.json"
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({**wanted, "complete": False}))
    for part in ("truth", *SPLITS):
        shutil.rmtree(out / part, ignore_errors=True)
    for part, name in product(("", "truth"), product(SPLITS, CLASSES)):
        out.joinpath(part, *name).mkdir(parents=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    jobs = [(split, index) for split, count in zip(SPLITS, (train, test), strict=True) for index in range(count)]
    for _ in tqdm(_written(out, seed, jobs, workers), "scenes", len(jobs), disable=not progress, unit="img"):
        pass
    record.write_text(json.dumps({**wanted, "complete": True}))
    return found


def _written(out: Path, seed: int, jobs: list[tuple[str, int]], workers: int | None) -> Iterator[None]:
    if workers is None:
        workers = usable_cores() if len(jobs) >= 200 else 1
    write = partial(_write_scene, out, seed)
    if workers == 1:
        yield from map(write, jobs)
        return
    # Spawned, not forked: the caller may hold threads (torch, Ray) that a fork would leave half alive.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(write, jobs, chunksize=25)


def _write_scene(out: Path, seed: int, job: tuple[str, int]) -> None:
    split, index = job
    label = index % len(CLASSES)
    scene = render_scene(np.random.default_rng((seed, SPLITS.index(split), index)), label)
    key = Path(split, CLASSES[label], f"{index:05d}")
    Image.fromarray(scene.image).save((out / key).with_suffix(".jpg"), quality=92)
    Image.fromarray(scene.truth).save((out / "truth" / key).with_suffix(".png"))


def _recorded(out: Path) -> dict | None:
    """The record of the set in `out`. Raises InputError for a folder of other things, which might be replaced."""
    record = out / "scenes.json"
    if not record.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out} holds something else than scenes",
            remedy="Choose a new or empty folder; the scenes would replace its train, test and truth folders.",
        )
    try:
        return json.loads(record.read_text())
    except (FileNotFoundError, ValueError):  # a torn record is that of a run that was stopped
        return None


def _all_there(found: SceneSet) -> bool:
    counts = {"train": found.train, "test": found.test}
    return all(
        sum(1 for _ in (found.root / part / split).glob("*/*")) == counts[split]
        for part in ("", "truth")
        for split in SPLITS
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo.scenes", description="Generate the scenes of the demo."
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="number of training pictures (%(default)s)")
    parser.add_argument("--test", type=int, default=1000, help="number of test pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    options = parser.parse_args()
    try:
        made = generate_scenes(options.out, options.train, options.test, options.seed, True, options.workers)
    except InputError as error:
        parser.exit(error.exit_status, f"{error}\n")
    print(f"{made.train} training scenes and {made.test} test scenes in {made.root}")


if __name__ == "__main__":
    main()
