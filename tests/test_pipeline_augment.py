"""Augmentation: pixels against PIL's and timm's operations, settings and draws against timm's.

Legend: B images; S input side.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from tiny import picture

from labeler.base.errors import InputError
from pipeline.augment import policy
from pipeline.augment.kernels import KERNELS, apply_kernels, warp
from pipeline.backends.pil_backend import PIL_KERNELS as TWINS

SIDE = 28
NAMES = {value: name for name, value in vars(policy).items() if name.isupper() and isinstance(value, int)}
# Each kernel's extremes, and whether it takes whole numbers.
AMOUNTS = {
    policy.AUTOCONTRAST: (0, 0, True),
    policy.EQUALIZE: (0, 0, True),
    policy.INVERT: (0, 0, True),
    policy.POSTERIZE: (0, 8, True),
    policy.SOLARIZE: (0, 256, True),
    policy.SOLARIZE_ADD: (0, 128, True),
    policy.COLOR: (0, 2, False),
    policy.CONTRAST: (0, 2, False),
    policy.BRIGHTNESS: (0, 2, False),
    policy.SHARPNESS: (0, 2, False),
    policy.BLUR: (0.1, 2, False),
}


def pictures() -> list[Image.Image]:
    """Smooth ones, dim ones, noise, and flat ones (no contrast to stretch, one level to equalise)."""
    rng = np.random.default_rng(0)
    smooth = [picture(seed, SIDE, SIDE) for seed in range(6)]
    dim = [image.point(lambda v: 90 + v // 5) for image in smooth[:3]]
    noise = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(3)]
    flat = [Image.new("RGB", (SIDE, SIDE), colour) for colour in [(0, 0, 0), (255, 255, 255), (7, 130, 200)]]
    half = np.asarray(smooth[0]).copy()
    half[..., 1] = 77  # one flat channel
    return [*smooth, *dim, *noise, *flat, Image.fromarray(half)]


def to_batch(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("kernel", AMOUNTS, ids=lambda kernel: NAMES[kernel].lower())
def test_a_kernel_does_what_its_pil_twin_does(kernel: int):
    assert set(AMOUNTS) == set(KERNELS) == set(TWINS)
    low, high, whole = AMOUNTS[kernel]
    images = pictures()
    rng = np.random.default_rng(kernel)
    for attempt in range(8):
        amounts = rng.uniform(low, high, (len(images), 1))
        amounts[:, 0] = {0: low, 1: high, 2: min(1.0, high)}.get(attempt, amounts[:, 0])
        amounts = np.rint(amounts) if whole else amounts
        found = apply_kernels(to_batch(images), np.full((len(images), 1), kernel), amounts)
        twins = [TWINS[kernel](image, float(amount)) for image, amount in zip(images, amounts[:, 0], strict=True)]
        difference = (found.int() - to_batch(twins).int()).abs()
        # PIL's blur runs in integers and rounds after each of its passes.
        assert difference.max() <= (4 if kernel == policy.BLUR else 0)
        assert difference.float().mean() <= 0.6


def test_no_bits_are_black():
    images = to_batch(pictures())
    assert apply_kernels(images, np.full((len(images), 1), policy.POSTERIZE), np.zeros((len(images), 1))).max() == 0


def test_each_image_gets_its_own_operations_in_their_order():
    images = pictures()[:4]
    invert, solarize, keep = policy.INVERT, policy.SOLARIZE, policy.KEEP
    kernels = np.array([[invert, solarize], [solarize, invert], [keep, invert], [keep, keep]])
    amounts = np.where(kernels == solarize, 100.0, 0.0)
    found = apply_kernels(to_batch(images), kernels, amounts)
    twins = list(images)
    for i, k in itertools.product(range(4), range(2)):
        if kernels[i, k] != keep:
            twins[i] = TWINS[int(kernels[i, k])](twins[i], amounts[i, k])
    assert torch.equal(found, to_batch(twins))


GEOMETRIC = {
    policy.ROTATE: (timm_ops.rotate, 30),
    policy.SHEAR_X: (timm_ops.shear_x, 0.3),
    policy.SHEAR_Y: (timm_ops.shear_y, 0.3),
    policy.TRANSLATE_X: (timm_ops.translate_x_rel, 0.3),
    policy.TRANSLATE_Y: (timm_ops.translate_y_rel, 0.3),
}
FILL = (10, 200, 60)


def one_by_one(image: Image.Image, kernels: list[int], amounts: list[float], fill: tuple[int, ...]) -> np.ndarray:
    for kernel, amount in zip(kernels, amounts, strict=True):
        operation = GEOMETRIC[kernel][0]
        image = operation(image, amount, fillcolor=fill, resample=Image.Resampling.BILINEAR)
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kernels", [*[(k,) for k in GEOMETRIC], *itertools.permutations(GEOMETRIC, 2)], ids=str)
def test_one_composed_map_does_what_timms_operations_do_one_after_the_other(kernels: tuple[int, ...]):
    side, white = 96, (255, 255, 255)
    image = picture(3, side, side)
    rng = np.random.default_rng(sum(kernels))
    for _ in range(3):
        amounts = [GEOMETRIC[k][1] * rng.uniform(0.5, 1) * rng.choice([-1, 1]) for k in kernels]
        affine = torch.from_numpy(policy.compose_geometric(np.array([kernels]), np.array([amounts])))
        found = warp(to_batch([image]), affine, FILL)[0].permute(1, 2, 0).int().numpy()
        # White stays white where no step let any ground in.
        shown = one_by_one(Image.new("RGB", (side, side), white), kernels, amounts, (0, 0, 0)).min(2) == 255
        bent = warp(torch.full((1, 3, side, side), 255, dtype=torch.uint8), affine, (0, 0, 0))[0].amin(0).numpy() == 255
        assert (bent >= shown).mean() > 0.99
        inside = shown & bent
        assert inside.mean() > 0.3
        difference = np.abs(found - one_by_one(image, kernels, amounts, FILL))[inside]
        # PIL drops the fraction, half a level on average, in each of timm's steps; `warp` once. Half a pixel off would
        # be three levels.
        assert difference.mean() < 0.5 * (len(kernels) - 1) + 0.1
        assert difference.max() <= (1 if len(kernels) == 1 else 8)
        assert (found[~bent] == FILL).all()


def test_a_later_operation_works_on_what_the_earlier_one_left():
    kernels, amounts = np.array([[policy.ROTATE, policy.TRANSLATE_X]]), np.array([[30.0, 0.3]])
    there = policy.compose_geometric(kernels, amounts)
    back = policy.compose_geometric(kernels[:, ::-1], amounts[:, ::-1])
    assert np.abs(there - back).max() > 0.1
    # Shifted last: the finished input's left edge shows what the turned one had at 0.3.
    turned = policy.compose_geometric(kernels[:, :1], amounts[:, :1])[0]
    np.testing.assert_allclose(there[0] @ [0.5, 0.0, 1], turned @ [0.5, 0.3, 1])


UNDERSTOOD = """rand rand-m9 rand-m9-mstd0.5-inc1 rand-m9-mstd0.5 rand-mmax5-n3-p0.25 rand-inc1 rand-inc0-m7
    rand-m15-mmax20-mstd101 rand-p1-n1"""


@pytest.mark.parametrize("text", UNDERSTOOD.split())
def test_randaugment_is_read_as_timm_reads_it(text: str):
    found, timm = policy.parse_rand_augment(text), timm_ops.rand_augment_transform(text, {"img_mean": FILL})
    assert list(found.operations) == [op.name for op in timm.ops]
    assert found.layers == timm.num_layers
    for op in timm.ops:
        assert (found.prob, found.magnitude) == (op.prob, op.magnitude)
        assert (found.magnitude_std, found.max_magnitude) == (op.magnitude_std, op.magnitude_max or 10)


@pytest.mark.parametrize(
    "text", ["rand-x3", "rand-m9-m8", "rand-m", "rand-tweights", "auto-m9", "rand-", "m9", "rand-m-9"]
)
def test_a_section_that_is_unknown_or_repeated_is_refused_by_name(text: str):
    with pytest.raises(InputError, match=repr(text)):
        policy.create_policies(text, 0.0)


def test_policies_follow_timm():
    jitter = policy.ColorJitter(0.3)
    assert policy.create_policies("3a", 0.3) == (policy.ThreeAugment(), jitter)
    assert policy.create_policies("rand-m5", 0.3) == (policy.RandAugment(magnitude=5),)
    assert policy.create_policies("none", 0.3) == policy.create_policies(None, 0.3) == (jitter,)
    assert policy.create_policies(None, 0.0) == ()


@pytest.mark.parametrize("name", policy.OPERATIONS)
def test_amounts_are_timms_for_each_level_and_sign(name: str, monkeypatch: pytest.MonkeyPatch):
    levels = np.concatenate([np.random.default_rng(5).uniform(0, 15, 200), np.arange(16)])
    for sign in (-1.0, 1.0):
        monkeypatch.setattr(timm_ops, "_randomly_negate", lambda value, sign=sign: sign * value)
        found = policy.OPERATIONS[name][1](levels / 10, np.full(len(levels), sign))
        level_to_arg = timm_ops.LEVEL_TO_ARG[name]
        expected = [level_to_arg(level, {})[0] if level_to_arg else 0 for level in levels]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_every_operation_is_drawn_equally_often_and_carried_out_with_its_probability():
    n, layers, prob = 20000, 2, 0.7
    kernels, amounts = policy.RandAugment(layers=layers, prob=prob, magnitude=9).draw(n, np.random.default_rng(6))
    assert kernels.shape == amounts.shape == (n, layers)
    share = prob / len(policy.PLAIN)
    found = Counter(kernels.flatten().tolist())
    # Four standard deviations of a share of 40000 draws.
    assert abs(found.pop(policy.KEEP) / kernels.size - (1 - prob)) < 4 * math.sqrt(prob * (1 - prob) / kernels.size)
    assert set(found) == {policy.OPERATIONS[name][0] for name in policy.PLAIN}
    for count in found.values():
        assert abs(count / kernels.size - share) < 4 * math.sqrt(share / kernels.size)
    angles = amounts[kernels == policy.ROTATE]
    assert set(np.abs(angles).round(9)) == {27.0}
    assert abs(np.sign(angles).mean()) < 4 / math.sqrt(len(angles))
    assert (amounts[kernels == policy.KEEP] == 0).all()


@pytest.mark.parametrize(("std", "top"), [(4.0, 10.0), (4.0, 6.0), (math.inf, 10.0), (0.5, 10.0)])
def test_levels_vary_as_told_and_stay_between_zero_and_the_maximum(std: float, top: float):
    drawn = policy.RandAugment(("Rotate",), 1, 1.0, 5.0, std, top).draw(20000, np.random.default_rng(7))[1]
    levels = np.abs(drawn) / 3  # 30 degrees at level 10
    if math.isinf(std):  # evenly from 0 to the magnitude
        expected = np.random.default_rng(8).uniform(0, 5, 20000)
    else:
        expected = np.clip(np.random.default_rng(8).normal(5, std, 20000), 0, top)
    assert levels.min() >= 0
    assert levels.max() <= top + 1e-9
    quantiles = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(levels, quantiles), np.quantile(expected, quantiles), atol=0.25)


def test_three_augment_draws_one_of_three_and_jitter_all_orders():
    n = 6000
    kernels, amounts = policy.ThreeAugment().draw(n, np.random.default_rng(9))
    assert kernels.shape == (n, 1)
    for kernel, low, high in ((policy.SOLARIZE, 128, 128), (policy.COLOR, 0, 0), (policy.BLUR, 0.1, 2.0)):
        here = amounts[kernels == kernel]
        assert abs(len(here) / n - 1 / 3) < 0.025  # four standard deviations
        assert low <= here.min() <= low + 0.02
        assert high - 0.02 <= here.max() <= high
    kernels, factors = policy.ColorJitter(0.4).draw(n, np.random.default_rng(10))
    orders = Counter(map(tuple, kernels.tolist()))
    assert set(orders) == set(itertools.permutations([policy.BRIGHTNESS, policy.CONTRAST, policy.COLOR]))
    assert min(orders.values()) > n / 6 * 0.85
    assert 0.6 <= factors.min() < 0.61 < 1.39 < factors.max() <= 1.4
    assert policy.ColorJitter(1.5).draw(n, np.random.default_rng(10))[1].min() >= 0


def test_equal_seeds_draw_equally_and_geometry_goes_into_the_affine_map():
    policies = (policy.parse_rand_augment("rand-m9-mstd0.5-n3-p0.9"), policy.ColorJitter(0.3))
    first, again, other = (policy.draw_augmentation(policies, 200, np.random.default_rng(s)) for s in (1, 1, 2))
    for name in ("kernels", "amounts", "affine"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert (getattr(first, name) != getattr(other, name)).any()
    assert first.kernels.shape == (200, 6)
    assert not np.isin(first.kernels, policy.GEOMETRIC).any()
    kernels, amounts = policies[0].draw(200, np.random.default_rng(1))
    kernels, amounts = (np.where(np.isin(kernels, policy.GEOMETRIC), a, policy.KEEP) for a in (kernels, amounts))
    np.testing.assert_allclose(first.affine, policy.compose_geometric(kernels, amounts))
    nothing = policy.draw_augmentation((), 3, np.random.default_rng(1))
    np.testing.assert_array_equal(nothing.affine, np.eye(2, 3)[None].repeat(3, 0))
    assert nothing.kernels.shape == (3, 0)
