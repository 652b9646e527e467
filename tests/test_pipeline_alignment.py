"""Every token's label must name the place that its pixels came from: images whose colours say where, real loaders.

Legend: B images; T tokens. Red is y and green is x, as shares of the decoded image's sides; the teacher reads them off.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import counts
from PIL import Image
from torch import nn

from labeler import LabelerConfig, TeacherConfig, label_images
from pipeline import Batch, LoaderConfig, TokenLabelLoader
from pipeline.augment.policy import RandAugment

SLOPE = 8.0  # nats from one side of an image to the other
GRID = (8, 4)  # not square, so that swapped axes show
SIDE = 64
MAP = 16  # cells of the label maps along each axis
BATCHES = counts(60, 200)
GEOMETRIC = RandAugment(("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"), 2, 0.8, 9, 0.5)


class PlaceTeacher(nn.Module):
    """Scores of classes 0 and 1, minus that of class 2, say where in the image a cell lies."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.default_cfg = {
            "input_size": (3, 4 * MAP, 4 * MAP),
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "interpolation": "bilinear",
            "crop_pct": 0.8,
        }

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        places = nn.functional.avg_pool2d(images[:, :2], 4) - 0.5
        return torch.cat([SLOPE * places, torch.zeros_like(places[:, :1])], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.score_maps(images).mean((2, 3))


def place_teacher() -> nn.Module:
    return PlaceTeacher()


def place_picture(height: int, width: int) -> Image.Image:
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return Image.fromarray((255 * np.stack([y, x, 0.5 + 0 * x], -1)).round().astype(np.uint8))


def untagged(image: Image.Image, orientation: int) -> Image.Image:
    """What a file with this EXIF tag holds, so that a viewer that obeys the tag shows `image`."""
    turn = Image.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }  # fmt: skip
    return image.transpose(undo[orientation]) if orientation > 1 else image


def make_places(root: Path, tags: bool) -> Path:
    """Sixteen pictures of different shapes, JPEG and PNG; with `tags`, each EXIF orientation twice."""
    root.mkdir()
    for i in range(16):
        image = place_picture(90 + 37 * (i % 5), 110 + 41 * (i % 4))
        exif = Image.Exif()
        if tags:
            exif[0x0112] = i % 8 + 1
            image = untagged(image, i % 8 + 1)
        if i < 10:
            image.save(root / f"{i:02d}.jpg", quality=97, subsampling=0, exif=exif)
        else:
            image.save(root / f"{i:02d}.png", exif=exif)
    return root


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """name -> (images, store): plain pictures, turned ones, and maps that cover the centre crop only."""
    folder = tmp_path_factory.mktemp("places")
    plain, tagged = make_places(folder / "plain", False), make_places(folder / "tagged", True)
    found = {}
    for name, images, view in (("plain", plain, "full"), ("exif", tagged, "full"), ("region", plain, "center")):
        teacher = TeacherConfig("test_pipeline_alignment:place_teacher", view=view)
        config = LabelerConfig(
            teacher, palette=3, precision="float16", shard_size=8, decoder="pil", threads=1, progress=False
        )
        label_images(images, folder / f"{name}-labels", config)
        found[name] = images, folder / f"{name}-labels"
    return found


def loader_of(stores: dict, name: str, backend: str, policies: tuple = (), **settings: object) -> TokenLabelLoader:
    images, store = stores[name]
    config = LoaderConfig(
        str(images), str(store), batch_size=16, image_size=SIDE, grid=GRID, backend=backend, cache="ram", threads=1
    )
    return TokenLabelLoader(replace(config, **settings), policies)


def mixed(batch: Batch, own: torch.Tensor) -> torch.Tensor:
    """[B, T, ...] of every image's own tokens -> with the partner's inside the batch's box."""
    if batch.mix is None or not batch.mixed_pixels:
        return own
    inside = batch.mix.mask(GRID).view(1, -1, *[1] * (own.ndim - 2))
    return torch.where(inside, own.flip(0), own)


def places_by_label(batch: Batch) -> torch.Tensor:
    """[B, T, 2]: where the label of each token says that it is, as shares of its image."""
    targets = batch.targets
    scores = torch.zeros(len(batch), 3, targets.token_scores.shape[2])
    scores.scatter_(1, targets.classes[:, :, None].expand_as(targets.token_scores), targets.token_scores)
    return mixed(batch, ((scores[:, :2] - scores[:, 2:]) / SLOPE + 0.5).transpose(1, 2))


def places_by_pixels(batch: Batch, config: LoaderConfig) -> torch.Tensor:
    """[B, T, 2]: where the colour of each token says that it is."""
    std, mean = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.std, config.mean))
    colours = nn.functional.avg_pool2d(batch.images * std + mean, config.patch)
    return colours[:, :2].flatten(2).transpose(1, 2)


def judged(batch: Batch, region: torch.Tensor, margin: float) -> torch.Tensor:
    """bool [B, T]: tokens whose whole area shows the crop, and lies in the map's region by `margin` map cells."""
    edges = [torch.linspace(0, 1, n + 1, dtype=torch.float64) for n in GRID]
    corners = torch.stack(torch.meshgrid(*edges, indexing="ij"), -1).view(1, -1, 2).expand(len(batch), -1, -1)
    views = batch.views
    shown = corners @ views.affine[:, :, :2].mT + views.affine[:, None, :, 2]
    good = ((shown > -1e-6) & (shown < 1 + 1e-6)).all(-1)
    low, high = region[:, None, :2], region[:, None, 2:]
    inset = margin * (high - low) / MAP
    place = views.to_image(corners)
    good &= ((place >= low + inset) & (place <= high - inset)).all(-1)
    grid = good.view(-1, GRID[0] + 1, GRID[1] + 1)
    tokens = grid[:, :-1, :-1] & grid[:, 1:, :-1] & grid[:, :-1, 1:] & grid[:, 1:, 1:]
    return mixed(batch, tokens.flatten(1)[..., None])[..., 0]


def half_a_token(batch: Batch) -> torch.Tensor:
    """[B, T, 2]: half a token's side, as shares of its image."""
    box = batch.views.boxes
    half = ((box[:, 2:] - box[:, :2]) / torch.tensor(GRID) / 2)[:, None].expand(-1, GRID[0] * GRID[1], -1)
    return mixed(batch, half)


@pytest.mark.parametrize("backend", ["dali", "cpu", "pil"])
@pytest.mark.parametrize(
    ("name", "geometric", "mix"),
    [("plain", False, "none"), ("plain", True, "image"), ("exif", True, "token"), ("region", True, "image")],
)
def test_every_token_is_labeled_with_the_place_its_pixels_came_from(stores, backend, name, geometric, mix):
    loader = loader_of(stores, name, backend, (GEOMETRIC,) if geometric else (), mix=mix)
    regions = torch.from_numpy(loader.samples.store.column("region")).double()
    tokens, flipped, slanted, worst = 0, 0, 0, 0.0
    for epoch in range(BATCHES):
        loader.set_epoch(epoch)
        (batch,) = loader
        far = (places_by_label(batch) - places_by_pixels(batch, loader.config)).abs()
        # In the outermost half cell of a map the nearest centre speaks for all: judged by a map's half cell there.
        inner = judged(batch, regions[batch.rows], 1.0)
        outer = judged(batch, regions[batch.rows], 0.0)
        excess = far / half_a_token(batch)
        assert excess[inner].max() <= 1, f"seed {epoch}: {excess[inner].max():.2f} half tokens off"
        region = regions[batch.rows]
        half_cell = mixed(batch, ((region[:, 2:] - region[:, :2]) / MAP / 2)[:, None].expand(-1, far.shape[1], -1))
        assert (far <= torch.maximum(half_cell, half_a_token(batch)) + 0.01)[outer].all()
        tokens += int(inner.sum())
        worst = max(worst, float(far[inner].max()))
        flipped += int((torch.linalg.det(batch.views.affine[:, :, :2]) < 0).sum())
        slanted += int((batch.views.affine[:, 0, 1] != 0).sum())
    print(f"{name}, {backend}: {tokens} tokens, the worst {worst:.4f} of the image's side off")
    assert tokens > 100 * BATCHES
    assert flipped > BATCHES
    assert bool(slanted) == geometric


@pytest.mark.parametrize("wrong", ["transposed", "mirrored", "unswapped"])
def test_the_alignment_test_would_notice_a_misaligned_crop(stores, wrong):
    loader = loader_of(stores, "plain", "dali", mix="image" if wrong == "unswapped" else "none")
    off = []
    for epoch in range(10):
        loader.set_epoch(epoch)
        (batch,) = loader
        labels, pixels = places_by_label(batch), places_by_pixels(batch, loader.config)
        grid = labels.view(len(batch), *GRID, 2)
        if wrong == "transposed":
            labels = grid.transpose(1, 2).flatten(1, 2)
        elif wrong == "mirrored":
            labels = grid.flip(2).flatten(1, 2)
        else:
            labels = places_by_label(replace(batch, mixed_pixels=False))
        excess = (labels - pixels).abs() / half_a_token(batch)
        off.append((excess > 1).any(-1).float().mean())
    assert np.mean(off) > 0.15


def test_orientation_follows_the_store_and_not_the_loader(stores, tmp_path):
    images = stores["exif"][0]
    teacher = TeacherConfig("test_pipeline_alignment:place_teacher")
    config = LabelerConfig(teacher, palette=3, orientation="ignore", decoder="pil", threads=1, progress=False)
    label_images(images, tmp_path / "raw", config)
    shapes = {}
    for name, store in (("exif", stores["exif"][1]), ("ignore", tmp_path / "raw")):
        loader = loader_of({"x": (images, store)}, "x", "dali", train=False, crop_pct=1.0)
        (batch,) = loader
        middle = places_by_pixels(batch, loader.config).view(16, *GRID, 2)
        # Going down the picture, red must rise where the tag was obeyed.
        shapes[name] = (middle[:, -1, 2, 0] - middle[:, 0, 2, 0]).tolist()
    assert min(shapes["exif"]) > 0.3
    assert min(shapes["ignore"]) < -0.3
