"""What is drawn for a batch, and how often.

Legend: B images; S input side.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import LoaderConfig
from pipeline.augment.draws import DRAWS_VERSION, draw_batch
from pipeline.augment.mix import MixBox
from pipeline.order import EpochOrder

COUNT = 20_000
SIZES = np.tile([[60, 80]], (COUNT, 1))
CONFIG = LoaderConfig("images", image_size=32, grid=(4, 4))


def draws(sizes: np.ndarray = SIZES, epoch: int = 0, batch: int = 0, **settings: object):
    return draw_batch(replace(CONFIG, **settings), (), sizes, epoch, batch)


def test_half_of_the_training_images_are_resized_with_the_bicubic_filter():
    assert abs(draws(train=True, interpolation="random").bicubic.mean() - 0.5) < 0.015
    assert draws(train=True, interpolation="bicubic").bicubic.all()
    assert not draws(train=True, interpolation="bilinear").bicubic.any()


def test_evaluation_draws_nothing():
    found = draws(SIZES[:50], train=False, interpolation="random", hflip=0.5, erase_prob=0.9, mix="none")
    assert found.bicubic.all()
    assert not found.hflip.any()
    assert (found.erased[:, 2:] == found.erased[:, :2]).all()
    assert not draws(SIZES[:5], train=False, interpolation="bilinear").bicubic.any()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_flips_erasing_and_mixing_have_their_probabilities(share):
    found = draws(train=True, hflip=share, erase_prob=share)
    assert abs(found.hflip.mean() - share) < 0.015
    assert abs((found.erased[:, 2:] > found.erased[:, :2]).all(1).mean() - share) < 0.015
    mixed = [draws(SIZES[:1], batch=i, train=True, mix="token", mix_prob=share).mix is not None for i in range(600)]
    assert abs(np.mean(mixed) - share) < 0.06


def test_a_view_is_the_window_and_its_flip():
    found = draws(SIZES[:200], train=True, hflip=0.5)
    assert torch.equal(found.views.boxes, torch.from_numpy(found.windows / [60, 80, 60, 80]))
    corners = torch.tensor([[[0.25, 0.25]]], dtype=torch.float64).expand(200, 1, 2)
    start, end = found.views.boxes[:, :2], found.views.boxes[:, 2:]
    inside = torch.where(torch.from_numpy(found.hflip)[:, None], torch.tensor([0.25, 0.75]), torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(found.views.to_image(corners)[:, 0], start + inside * (end - start))


def test_draws_depend_on_seed_epoch_batch_and_rank():
    first = draws(SIZES[:20], train=True).windows
    assert (draws(SIZES[:20], train=True).windows == first).all()
    for other in ({"seed": 1}, {"rank": 1, "world_size": 2}, {"epoch": 1}, {"batch": 1}):
        assert (draws(SIZES[:20], train=True, **other).windows != first).any()


@pytest.mark.parametrize("samples", [13, 16, 19, 20, 22])
def test_ranks_share_an_evaluation_and_each_sample_comes_once(samples):
    orders = [EpochOrder(samples, 4, rank, 2, shuffle=False) for rank in (0, 1)]
    seen = [order.batch(order.epoch(0), b) for order in orders for b in range(len(order))]
    assert sorted(np.concatenate(seen).tolist()) == list(range(samples))
    assert all(len(batch) for batch in seen)


@pytest.mark.parametrize("samples", [17, 20, 21, 24])
def test_only_a_rank_with_samples_has_a_last_batch(samples):
    lengths = [len(EpochOrder(samples, 4, rank, 2, shuffle=False)) for rank in (0, 1)]
    assert lengths == [3, 2 + (samples > 20)]
    assert [len(EpochOrder(samples, 4, rank, 2)) for rank in (0, 1)] == [samples // 8] * 2
    assert len(EpochOrder(3, 4, 1, 2, shuffle=False)) == 0
    alone = EpochOrder(samples, 4)
    assert alone.batch(np.arange(samples), 1).tolist() == [4, 5, 6, 7]


def test_a_version_draws_what_it_has_always_drawn():
    """A run that is resumed by a newer release goes on with the same images: who changes this counts up the version."""
    found = draws(SIZES[:3], epoch=2, batch=5, train=True, seed=9, mix="token", erase_prob=0.5)
    assert DRAWS_VERSION == 1
    assert found.windows.tolist() == [[6, 0, 50, 42], [20, 19, 48, 42], [10, 21, 49, 63]]
    assert found.bicubic.tolist() == [False, True, True]
    assert found.erased.tolist() == [[5, 15, 8, 24], [1, 0, 12, 20], [29, 12, 29, 12]]
    assert found.mix == MixBox(0, 1, 2, 3, 0.75)
    assert found.noise_seed == 4405067445529660881
    assert EpochOrder(8, 2, seed=9).epoch(2).tolist() == [6, 3, 0, 4, 5, 1, 7, 2]
    shards = EpochOrder(8, 2, seed=9, groups=np.array([0, 0, 0, 1, 1, 1, 2, 2]), window=2)
    assert shards.epoch(2).tolist() == [3, 4, 5, 0, 1, 2, 6, 7]
