"""The palette codec: what it keeps of a teacher's distribution, and what its decoded form means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import synthetic_logits

from labeler.errors import InputError
from labeler.score_maps import ScoreMaps, code_table, encode_palette

FLOOR = -20.0
TABLE = code_table(0.06, -3.0, 0.25, FLOOR)
FULL = np.array([[0, 0, 1, 1]], np.float32)


def decode(found, num_classes: int, table: np.ndarray | None) -> ScoreMaps:
    scores, background = found.scores.astype(np.float32), found.background.astype(np.float32)
    if table is not None:
        scores, background = table[found.scores], table[found.background]
    return ScoreMaps(found.classes, scores, background, FULL.repeat(len(scores), 0), num_classes)


def test_dense_is_the_softmax_over_palette_and_background_copies():
    maps = ScoreMaps(
        np.array([[4, 1, -1]]),
        np.array([[[[-0.5]], [[-2.0]], [[3.0]]]], np.float32),  # the unused place must not count
        np.array([[[-4.0]]], np.float32),
        FULL,
        num_classes=6,
    )
    weights = np.array([np.exp(-4.0), np.exp(-2.0), np.exp(-4.0), np.exp(-4.0), np.exp(-0.5), np.exp(-4.0)])
    np.testing.assert_allclose(maps.dense()[0, :, 0, 0], weights / weights.sum(), rtol=1e-6)


def test_dense_is_the_same_on_tensors():
    found = encode_palette(synthetic_logits(3, 40, 7, seed=0), 6, TABLE, FLOOR)
    maps = decode(found, 40, TABLE)
    np.testing.assert_allclose(maps.to_torch().dense().numpy(), maps.dense(), atol=1e-6)


@pytest.mark.parametrize("table", [TABLE, None], ids=["uint8", "float16"])
def test_the_palette_holds_the_largest_classes_first_and_their_scores_to_half_a_step(table):
    logits = synthetic_logits(4, 60, 9, seed=1)
    log_p = logits.log_softmax(1)
    found = encode_palette(logits, 10, table, FLOOR)
    share = log_p.exp().mean((2, 3))
    np.testing.assert_array_equal(found.classes, share.argsort(1, descending=True)[:, :10].numpy())
    truth = np.take_along_axis(log_p.numpy(), found.classes[:, :, None, None], axis=1)
    error = np.abs(decode(found, 60, table).scores - truth)
    half_step = 0.011 if table is None else np.where(truth > -3, 0.031, 0.126)
    # A class that rounding would tie with the cell's first goes one step down instead.
    near_first = (truth.max(1, keepdims=True) - truth <= 2 * half_step) & (truth < truth.max(1, keepdims=True))
    assert (error <= np.where(near_first, 3 * half_step, half_step)).all()


def test_rounding_never_changes_the_first_class_of_a_cell():
    logits = synthetic_logits(8, 20, 18, seed=7)
    found = encode_palette(logits, 20, code_table(0.5, -3.0, 1.0, FLOOR), FLOOR)
    first = np.take_along_axis(found.classes[:, :, None, None], found.scores.argmin(1)[:, None], 1)[:, 0]
    np.testing.assert_array_equal(first, logits.argmax(1).numpy())


def test_the_background_keeps_the_mass_of_all_other_classes():
    logits = synthetic_logits(2, 300, 6, seed=2)
    found = encode_palette(logits, 8, None, FLOOR)
    p = logits.softmax(1)
    inside = torch.zeros(2, 300, dtype=torch.bool).scatter_(1, torch.from_numpy(found.classes), True)
    left = (p * ~inside[:, :, None, None]).sum(1)
    np.testing.assert_allclose(292 * np.exp(found.background.astype(np.float64)), left.numpy(), rtol=1e-2)
    np.testing.assert_allclose(found.coverage, 1 - left.mean((1, 2)).numpy(), atol=1e-6)


@pytest.mark.parametrize("table", [TABLE, None], ids=["uint8", "float16"])
def test_the_reported_kl_is_that_of_the_dense_distributions(table):
    logits = synthetic_logits(3, 50, 8, seed=3)
    found = encode_palette(logits, 6, table, FLOOR)
    p = logits.double().softmax(1)
    q = torch.from_numpy(decode(found, 50, table).dense()).double()
    kl = (p * (p.log() - q.log())).sum(1).mean((1, 2))
    np.testing.assert_allclose(found.kl, kl.numpy(), rtol=2e-3, atol=2e-6)
    entropy = -(p * p.log()).sum(1).mean((1, 2))
    np.testing.assert_allclose(found.entropy, entropy.numpy(), rtol=1e-5)


def test_fewer_classes_than_places_leave_unused_places_and_no_error():
    logits = synthetic_logits(2, 10, 5, seed=4)
    maps = decode(encode_palette(logits, 16, None, FLOOR), 10, None)
    assert maps.classes.shape == (2, 16)
    assert (maps.classes[:, 10:] == -1).all()
    np.testing.assert_allclose(maps.dense(), logits.softmax(1).numpy(), atol=2e-3)


def test_a_class_below_the_floor_everywhere_is_left_to_the_background():
    logits = torch.zeros(1, 5, 2, 2)
    logits[:, 0], logits[:, 1] = 30.0, 29.0
    found = encode_palette(logits, 4, TABLE, FLOOR)
    assert found.classes.tolist() == [[0, 1, -1, -1]]


def test_images_do_not_influence_each_other():
    logits = synthetic_logits(5, 30, 6, seed=5)
    together = encode_palette(logits, 8, TABLE, FLOOR)
    alone = encode_palette(logits[3:4], 8, TABLE, FLOOR)
    np.testing.assert_array_equal(together.scores[3:4], alone.scores)
    np.testing.assert_array_equal(together.classes[3:4], alone.classes)


def test_top1_is_the_most_probable_class_of_a_cell():
    logits = synthetic_logits(4, 30, 6, seed=6)
    maps = decode(encode_palette(logits, 30, None, FLOOR), 30, None)
    assert (maps.top1() == logits.argmax(1).numpy()).mean() > 0.99


def test_code_table_has_fine_steps_near_zero_and_coarse_ones_below():
    steps = -np.diff(TABLE[TABLE > FLOOR])
    assert TABLE.shape == (256,)
    assert TABLE[0] == 0
    assert TABLE[-1] == pytest.approx(FLOOR, abs=0.25)
    np.testing.assert_allclose(steps[TABLE[1:][: len(steps)] > -2.99], 0.06, atol=1e-5)
    np.testing.assert_allclose(steps[TABLE[:-1][: len(steps)] <= -3.0], 0.25, atol=1e-5)


@pytest.mark.parametrize("settings", [(0.06, -3, 0.02, -20), (0, -3, 0.25, -20), (0.06, -25, 0.25, -20)])
def test_impossible_code_tables_are_refused(settings):
    with pytest.raises(InputError):
        code_table(*settings)
