"""Masks go with their images: the same crop, flip and turn; what is wrong with a mask is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from labeler.base.errors import InputError, IntegrityError
from pipeline import LoaderConfig, TokenLabelLoader, create_loader
from pipeline.augment.policy import RandAugment
from pipeline.geometry import Views, compose, flips, identity
from pipeline.targets.crop_masks import crop_mask, crop_masks
from pipeline.targets.mask_files import MaskFolder

SIDE, IGNORED = 32, 255
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def write(folder, key, mask, images=None):
    """A mask, and an image in which each class has a gray value of its own."""
    (folder / "masks" / key).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save((folder / "masks" / key).with_suffix(".png"))
    picture = (folder / "images" / key).with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    gray = np.where(mask == IGNORED, 250, 60 * mask.astype(int)).astype(np.uint8)
    Image.fromarray(np.repeat(gray[..., None], 3, 2)).save(picture)


@pytest.fixture
def folder(tmp_path):
    """Pictures of large areas, one of them not labeled, in landscape and portrait format."""
    generator = np.random.default_rng(0)
    for number in range(8):
        mask = np.zeros((48, 80) if number % 2 else (90, 50), np.uint8)
        y, x = generator.integers(10, 30, 2)
        mask[y:, :] = 1
        mask[:, x:] += 2
        mask[-8:, -8:] = IGNORED
        write(tmp_path, f"street/{number}.png", mask)
    return tmp_path


def config(folder, **settings):
    usual = {
        "images": str(folder / "images"),
        "masks": str(folder / "masks"),
        "classes": "none",
        "num_classes": 4,
        "token_labels": False,
        "batch_size": 4,
        "image_size": SIDE,
        "grid": (1, 1),
        "mean": (250 / 255,) * 3,  # what a turn uncovers gets the color of what is not labeled
        "std": (1.0, 1.0, 1.0),
        "interpolation": "bilinear",
        "device": "cpu",
        "scale": (0.2, 1.0),
        "progress": False,
    }
    return LoaderConfig(**(usual | settings))


@pytest.mark.parametrize("backend", ["cpu", "pil"])
@pytest.mark.parametrize("turned", [False, True])
def test_each_pixel_has_the_class_of_its_image_after_crops_flips_and_turns(folder, backend, turned):
    # Geometry alone: changed colors would hide which class a pixel shows. None: crops and flips.
    policies = (RandAugment(GEOMETRIC, layers=1, prob=1.0, magnitude=9),) if turned else None
    loader = TokenLabelLoader(config(folder, backend=backend, seed=3), policies)
    agreed = counted = 0
    for _ in range(3):
        for batch in loader:
            assert batch.masks is not None
            assert batch.masks.shape == (4, SIDE, SIDE)
            gray = 255 * batch.images[:, 0] + 250
            wanted = torch.where(batch.masks == IGNORED, 250.0, 60.0 * batch.masks)
            # Inside of areas; at their edges the image's resize mixes two classes.
            padded = torch.nn.functional.pad(wanted[:, None], (2, 2, 2, 2), mode="replicate")
            inside = torch.nn.functional.max_pool2d(padded, 5, 1) == -torch.nn.functional.max_pool2d(-padded, 5, 1)
            inside = inside[:, 0]
            agreed += ((gray - wanted).abs() < 8)[inside].sum().item()
            counted += inside.sum().item()
    assert counted > 5000
    assert agreed / counted > 0.999


def test_the_fast_crop_of_upright_views_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    masks = [np.random.default_rng(i).integers(0, 9, (20 + i, 31 - i)).astype(np.uint8) for i in range(6)]
    low = torch.rand(6, 2, generator=generator, dtype=torch.float64) * 0.4
    boxes = torch.cat([low, low + 0.2 + 0.4 * torch.rand(6, 2, generator=generator, dtype=torch.float64)], 1)
    shifted = identity(6)
    shifted[:, 0, 2] = torch.tensor([0, 0, 0.3, -0.3, 0, 0])
    affine = compose(flips(torch.tensor([False, True] * 3)), shifted)
    views = Views(boxes, affine)
    fast = crop_masks(masks, views, 17, IGNORED)
    for b, mask in enumerate(masks):
        one = Views(boxes[b : b + 1], affine[b : b + 1])
        assert torch.equal(fast[b], crop_mask(mask, one, 17, IGNORED))


def test_a_whole_view_at_its_own_size_is_the_mask_and_a_resize_is_pillows_nearest():
    mask = np.random.default_rng(0).integers(0, 9, (25, 25)).astype(np.uint8)
    views = Views(torch.tensor([[0, 0, 1, 1]], dtype=torch.float64), identity(1))
    assert (crop_masks([mask], views, 25, IGNORED)[0].numpy() == mask).all()
    small = np.asarray(Image.fromarray(mask).resize((9, 9), Image.Resampling.NEAREST))
    assert (crop_masks([mask], views, 9, IGNORED)[0].numpy() == small).all()


def test_every_crop_is_pillows_nearest_one_also_where_two_pixels_are_equally_near():
    generator = np.random.default_rng(0)
    for _ in range(400):
        height, width = generator.integers(8, 90, 2)
        mask = generator.integers(0, 250, (height, width), dtype=np.uint8)
        y0, x0 = generator.integers(0, height - 4), generator.integers(0, width - 4)
        y1, x1 = generator.integers(y0 + 2, height + 1), generator.integers(x0 + 2, width + 1)
        box = torch.tensor([[y0 / height, x0 / width, y1 / height, x1 / width]], dtype=torch.float64)
        expected = Image.fromarray(mask).crop((x0, y0, x1, y1)).resize((16, 16), Image.Resampling.NEAREST)
        mirrored = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for flipped, picture in ((False, expected), (True, mirrored)):
            view = Views(box, flips(torch.tensor([flipped])))
            assert np.array_equal(crop_masks([mask], view, 16, IGNORED)[0].numpy(), np.asarray(picture))


def test_what_a_shift_uncovers_is_not_labeled():
    mask = np.zeros((10, 10), np.uint8)
    shifted = identity(1)
    shifted[0, 1, 2] = 0.5  # half of the input lies to the right of the crop
    crop = crop_masks([mask], Views(torch.tensor([[0, 0, 1, 1]], dtype=torch.float64), shifted), 10, IGNORED)[0]
    assert (crop[:, :5] == 0).all()
    assert (crop[:, 5:] == IGNORED).all()


def test_masks_are_moved_and_resumed_with_their_batch(folder):
    loader = create_loader(config(folder, backend="pil"))
    first = next(iter(loader))
    state = loader.state_dict()
    rest = [batch.masks for batch in loader]
    again = create_loader(config(folder, backend="pil"))
    again.load_state_dict(state)
    assert all(torch.equal(one, batch.masks) for one, batch in zip(rest, again, strict=True))
    assert torch.equal(first.to("cpu").masks, first.masks)


def told(error):
    return str(error.value)


def test_a_missing_mask_is_named_before_any_work(folder):
    (folder / "masks" / "street" / "3.png").unlink()
    with pytest.raises(InputError, match="1 of 8 images have no mask") as error:
        create_loader(config(folder))
    assert "street/3.png" in told(error)
    with pytest.raises(InputError, match="the folder of masks does not exist"):
        create_loader(config(folder, masks=str(folder / "none")))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((9, 9), np.uint8), "does not fit its image"),
        (np.full((48, 80), 4, np.uint8), "names an unknown class: got 4"),
        (np.zeros((48, 80, 3), np.uint8), "has no class ids"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(folder, mask, words):
    Image.fromarray(mask).save(folder / "masks" / "street" / "1.png")
    with pytest.raises(IntegrityError) as error:
        for _ in create_loader(config(folder, backend="pil")):
            pass
    assert words in told(error)
    assert "1.png" in told(error)


def test_a_mask_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(IntegrityError, match="cannot be read"):
        MaskFolder(tmp_path, 3, IGNORED).read("a.jpg")


def test_masks_need_a_number_of_classes_and_no_mixing(folder):
    with pytest.raises(InputError, match="masks does not fit"):
        config(folder, num_classes=None)
    with pytest.raises(InputError, match="mix does not fit"):
        config(folder, mix="token")
