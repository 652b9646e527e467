"""What the loader does on a device: without waiting for it, and the same as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unreadable import META, Unreadable, without_autocast

from labeler.base.runtime import on_device
from labeler.store.score_maps import ScoreMaps
from pipeline.augment import policy
from pipeline.augment.erasing import draw_erased, erase, fill_boxes, fill_boxes_at_once
from pipeline.augment.kernels import KERNELS, apply_kernels, warp
from pipeline.targets.crop_score_maps import crop_score_maps
from scripts.benchmark.inputs.synthetic_batch import SyntheticLabels
from train.evaluation.evaluate import _right_classes, count_right

SLANTED = torch.tensor([[[0.9, 0.2, 0.0], [-0.2, 0.9, 0.1]]], dtype=torch.float64)


def maps_with_host_regions(device: str) -> tuple[ScoreMaps, torch.Tensor]:
    labels = SyntheticLabels(6, 5, 3, "cpu")
    moved = {name: value.to(device) for name, value in vars(labels.maps).items() if isinstance(value, torch.Tensor)}
    moved["region"] = labels.maps.region
    return ScoreMaps(num_classes=labels.maps.num_classes, **moved), labels.boxes


@pytest.mark.parametrize("slanted", [0, 2, 6])
def test_cropping_labels_does_not_wait_for_the_device(slanted, monkeypatch):
    affine = torch.eye(2, 3, dtype=torch.float64).repeat(6, 1, 1)
    affine[:slanted] = SLANTED
    hflip = torch.arange(6) % 2 == 0
    expected = crop_score_maps(*maps_with_host_regions("cpu"), (4, 4), hflip, affine)
    maps, boxes = maps_with_host_regions("meta")
    without_autocast(monkeypatch)
    with Unreadable():
        found = crop_score_maps(maps, boxes, (4, 4), hflip, affine)
    for ours, theirs in zip(found.tensors().values(), expected.tensors().values(), strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, META)


def test_augmenting_does_not_wait_for_the_device():
    kernels = np.array([sorted(KERNELS)]).T
    amounts = np.linspace(0.3, 2.0, len(kernels))[:, None]
    images = torch.zeros(len(kernels), 3, 16, 16, dtype=torch.uint8, device=META)
    assert policy.BLUR in kernels
    with Unreadable():
        apply_kernels(images, kernels, amounts)
        warp(images[:2], SLANTED.repeat(2, 1, 1), (1, 2, 3))


def test_erasing_and_labels_of_an_evaluation_do_not_wait_for_the_device():
    boxes = draw_erased(8, 16, 0.7, np.random.default_rng(0))
    images, labels = torch.zeros(8, 3, 16, 16, device=META), torch.zeros(8, dtype=torch.int64, device=META)

    class Labeled:
        pass

    batch = Labeled()
    batch.images, batch.labels = images, labels  # type: ignore[attr-defined]
    with Unreadable():
        erase(images, boxes, "const", torch.Generator())
        on_device(boxes, META)
        count_right(torch.zeros(8, 5, device=META), _right_classes(batch, 5, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("prob", [0.0, 0.4, 1.0])
def test_boxes_filled_at_once_are_those_filled_one_by_one(prob):
    rng = np.random.default_rng(3)
    boxes = draw_erased(9, 20, prob, rng)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(9, 3, 20, 20, generator=generator)
    values = torch.randn(int(3 * (boxes[:, 2:] - boxes[:, :2]).prod(1).sum()), generator=generator)
    expected, found = (fill(images.clone(), boxes, values) for fill in (fill_boxes, fill_boxes_at_once))
    assert torch.equal(found, expected)
    assert torch.equal(found, images) == (prob == 0)
