"""Decoded maps: what palette, background and tail mean together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny import synthetic_logits

from labeler.base.errors import InputError
from labeler.store.encoder import encode_maps, encode_planes
from labeler.store.score_code import Encoding, ScoreCode, code_table, share_of_reference
from labeler.store.score_maps import ScoreMaps, class_shares

TABLE_1 = np.linspace(0, -20, 256, dtype=np.float32)


def decoded(logits: torch.Tensor, encoding: Encoding) -> ScoreMaps:
    """As `LabelStore.read` gives the maps back."""
    found = encode_maps(logits, encoding)
    table = code_table(encoding.levels) if encoding.precision == "uint8" else None
    scores, background = ScoreCode(table, table is not None).decode(found.scores, found.background)
    offsets = found.tail_offsets.astype(np.float32) / 4
    return ScoreMaps(found.classes, scores, background, None, logits.shape[1], found.tail_classes, offsets)


def test_dense_is_the_softmax_over_palette_tail_and_background_copies():
    maps = ScoreMaps(
        np.array([[4, 1, -1]]),
        np.array([[[[-0.5]], [[-2.0]], [[3.0]]]], np.float32),  # the unused place must not count
        np.array([[[-4.0]]], np.float32),
        num_classes=6,
        tail_classes=np.array([[-1, 3]]),
        tail_offsets=np.array([[9.0, 1.5]], np.float32),  # nor this one's
    )
    weights = np.exp([-4.0, -2.0, -4.0, -2.5, -0.5, -4.0])
    np.testing.assert_allclose(maps.dense()[0, :, 0, 0], weights / weights.sum(), rtol=1e-6)
    assert maps.top1().tolist() == [[[4]]]


def test_dense_is_the_same_on_tensors():
    maps = decoded(synthetic_logits(3, 40, 7, seed=0), Encoding(palette=6, tail=9))
    assert (maps.tail_classes >= 0).any()
    np.testing.assert_allclose(maps.to_torch().dense().numpy(), maps.dense(), atol=1e-6)


@pytest.mark.parametrize("lift", [0.0, 500.0])
def test_shares_of_classes_are_those_of_the_dense_softmax(lift):
    """Also of logits whose exponentials are infinite."""
    maps = decoded(synthetic_logits(3, 40, 7, seed=2), Encoding(palette=6, tail=9))
    unused = np.concatenate([maps.classes[:, :-1], np.full((3, 1), -1)], 1)
    maps = dataclasses.replace(maps, classes=unused, scores=maps.scores + lift, background=maps.background + lift)
    found, dense = class_shares(maps), maps.dense().astype(np.float64)
    for b in range(3):
        used, tail = maps.classes[b][maps.classes[b] >= 0], maps.tail_classes[b][maps.tail_classes[b] >= 0]
        np.testing.assert_allclose(found.p[b][maps.classes[b] >= 0], dense[b][used], atol=1e-5)
        assert (found.p[b][maps.classes[b] < 0] == 0).all()
        np.testing.assert_allclose(found.tail[b], dense[b][tail].sum(0), atol=1e-5)
        other = np.setdiff1d(np.arange(40), [*used, *tail])
        np.testing.assert_allclose(found.left[b], dense[b][other].sum(0), atol=1e-5)
        np.testing.assert_allclose(found.shared[b], dense[b][other[0]], atol=1e-5)
    np.testing.assert_allclose(found.confidence, dense.max(1), atol=1e-5)
    np.testing.assert_allclose(found.entropy, -(dense * np.log(dense)).sum(1), atol=5e-4)


def test_region_and_tail_may_be_left_out():
    maps = ScoreMaps(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, 3), num_classes=5)
    assert maps.region.tolist() == [[0, 0, 1, 1]] * 2
    assert maps.tail_classes.shape == maps.tail_offsets.shape == (2, 0)
    torch.testing.assert_close(maps.dense(), torch.full((2, 5, 3, 3), 0.2))
    with pytest.raises(InputError, match="num_classes"):
        ScoreMaps(np.zeros((1, 1), np.int64), np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1)))


def test_top1_is_the_most_probable_class_of_a_cell_also_where_the_tail_leads():
    logits = synthetic_logits(4, 30, 6, seed=6)
    assert (decoded(logits, Encoding(levels=160, threshold=0)).top1() == logits.argmax(1).numpy()).mean() > 0.97
    tail = {"tail_classes": np.array([[5, 7, -1]]), "tail_offsets": np.array([[0.5, 1.0, 9.0]], np.float32)}
    scores = np.array([[[[-1.5, -2.5]]]], np.float32)
    maps = ScoreMaps(np.array([[3]]), scores, np.full((1, 1, 2), -3.0, np.float32), num_classes=30, **tail)
    assert maps.top1().tolist() == maps.dense().argmax(1).tolist() == [[[3, 7]]]


def test_a_code_of_zero_is_the_background_in_its_cell_in_format_2_only():
    table = code_table(20)
    scores, background = np.array([[[[0, 20]]]], np.uint8), np.array([[[25, 29]]], np.uint8)
    decoded_scores, decoded_background = ScoreCode(table, True).decode(scores, background)
    assert decoded_scores[0, 0, 0].tolist() == [decoded_background[0, 0, 0], 0.0]
    falling = np.linspace(0, -20, 256, dtype=np.float32)
    assert ScoreCode(falling, False).decode(scores, background)[0][0, 0, 0, 0] == 0.0


@pytest.mark.parametrize(
    "code", [ScoreCode.of_roots(20), ScoreCode(TABLE_1, False), ScoreCode(None, False)], ids=["2", "1", "f2"]
)
@pytest.mark.parametrize("with_background", [True, False])
@pytest.mark.parametrize("images", [0, 1, 19])
def test_arrays_and_tensors_are_decoded_alike_bit_for_bit(code, with_background, images):
    """Of every code, and of more images than the decoder of tensors takes at a time."""
    random = np.random.default_rng(0)
    stored = random.integers(0, 256, (images, 5, 4, 4))
    stored[..., 0] *= random.random(stored.shape[:-1]) < 0.5
    scores = stored.astype(np.uint8) if code.values is not None else -(stored / 16).astype(np.float16)
    shared = scores[:, 0].copy() if with_background else None
    found = code.decode(torch.from_numpy(scores), None if shared is None else torch.from_numpy(shared))
    for tensor, array in zip(found, code.decode(scores, shared), strict=True):
        assert (tensor.dtype, array.dtype) == (torch.float32, np.float32)
        assert tensor.numpy().tobytes() == array.tobytes()
    offsets = np.arange(-124, 125, dtype=np.int8)
    assert code.decode_offsets(torch.from_numpy(offsets)).numpy().tobytes() == code.decode_offsets(offsets).tobytes()


def test_codes_of_probabilities_mean_the_nearest_step_of_the_root():
    code = ScoreCode.of_roots(20)
    p = torch.linspace(0, 1, 1001)
    codes = code.root_codes(p)
    assert (codes / 20 - p.sqrt()).abs().max() <= 0.5 / 20 + 1e-6
    torch.testing.assert_close(code.root_probabilities(codes[codes > 0]).log(), code.root_scores(codes[codes > 0]))
    np.testing.assert_allclose(code.root_scores(codes[codes > 0]), code.values[codes[codes > 0].long()], atol=1e-6)
    stored, scores = code.background_codes(torch.tensor([-0.1, -0.2, -7.3, -99.0]))
    assert scores.tolist() == [0, -0.25, -7.25, -20]
    assert code.values[stored.numpy()].tolist() == scores.tolist()


def test_planes_of_format_1_and_of_float16_are_dense():
    logits = synthetic_logits(2, 10, 5, seed=4)
    found = encode_planes(logits, 16, None)
    assert found.classes.shape == (2, 16)
    assert (found.classes[:, 10:] == -1).all()
    maps = ScoreMaps(found.classes, found.scores.astype(np.float32), found.background.astype(np.float32), None, 10)
    np.testing.assert_allclose(maps.dense(), logits.softmax(1).numpy(), atol=2e-3)


def test_one_class_is_enough():
    maps = ScoreMaps(
        np.zeros((1, 1), np.int64), np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 2, 2), np.float32), num_classes=1
    )
    assert (maps.dense() == 1).all()
    with pytest.raises(InputError, match="how many classes"):
        dataclasses.replace(maps, num_classes=0)


@pytest.mark.parametrize(("reference", "share"), [(2.0, 0.25), (1e-9, None), (-1e-7, None), (0.0, None)])
def test_a_share_of_a_loss_that_is_only_rounding_is_left_out(reference, share):
    """Five logits a cell are all that a teacher of five classes has: those files lose nothing of its maps."""
    assert share_of_reference(0.5, reference, rows=10) == share
