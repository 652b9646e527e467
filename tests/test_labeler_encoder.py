"""The encoder: what it keeps of a teacher's distribution, what that costs, and that its own figures are true."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_labeler_score_maps import decoded
from tiny import synthetic_logits

from labeler.base.errors import InputError
from labeler.store.choose_codes import keep_first
from labeler.store.encoder import encode_maps, encode_planes, reference_kl
from labeler.store.score_code import FLOOR, MAX_LEVELS, QUALITIES, Encoding, code_table

TINY_TABLE = np.pad(-np.arange(0, 20, 0.1, dtype=np.float32), (0, 56), mode="edge")  # falling, as format 1.0 has it


def teacher_like(images: int, classes: int, grid: int, seed: int) -> torch.Tensor:
    """Unsure, as trained with smoothing: a few classes here and there, many that an image makes a little likelier."""
    liking = torch.randn(images, classes, 1, 1, generator=torch.Generator().manual_seed(seed))
    return 0.35 * synthetic_logits(images, classes, grid, seed=seed) + 0.8 * liking


def kl_of(logits: torch.Tensor, encoding: Encoding) -> np.ndarray:
    p = logits.double().softmax(1)
    q = torch.from_numpy(decoded(logits, encoding).dense()).double()
    return (p * (p.log() - q.log())).sum(1).mean((1, 2)).numpy()


@pytest.mark.parametrize("encoding", [*QUALITIES.values(), Encoding(palette=4, tail=0), Encoding(precision="float16")])
@pytest.mark.parametrize("classes", [3, 50, 400])
def test_the_reported_kl_is_that_of_the_dense_distributions(encoding, classes):
    logits = teacher_like(3, classes, 8, seed=3)
    found = encode_maps(logits, encoding)
    np.testing.assert_allclose(found.kl, kl_of(logits, encoding), rtol=3e-3, atol=3e-6)
    p = logits.double().softmax(1)
    np.testing.assert_allclose(found.entropy, -(p * p.log()).sum(1).mean((1, 2)).numpy(), rtol=1e-5)


def test_the_reported_first_classes_are_those_that_the_decoded_maps_have():
    logits = teacher_like(9, 300, 8, seed=1)
    found, maps = encode_maps(logits, Encoding(palette=20)), decoded(logits, Encoding(palette=20))
    dense = maps.dense()
    kept = (dense.argmax(1) == logits.argmax(1).numpy()) & (dense.max(1) > np.sort(dense, 1)[:, -2])
    np.testing.assert_allclose(found.first_kept, kept.mean((1, 2)), atol=1e-6)
    assert 0.2 < found.first_kept.mean() < 1


def test_first_classes_are_counted_also_where_the_tail_is_empty():
    found = encode_maps(2 * synthetic_logits(4, 20, 8, seed=5), Encoding(levels=MAX_LEVELS, threshold=1e-4))
    assert (found.tail_classes < 0).any(1).all()
    assert found.first_kept.min() > 0.99


def test_planes_that_no_class_fills_name_none():
    logits = synthetic_logits(2, 3, 4, seed=1)
    logits[0, 2] = -1e4  # a class without any probability
    found = encode_planes(logits, 5, TINY_TABLE)
    assert found.classes[:, 3:].tolist() == [[-1, -1]] * 2
    assert sorted(found.classes[1, :3].tolist()) == [0, 1, 2]
    assert 2 not in found.classes[0]
    assert (found.classes[0, :3] == -1).sum() == 1


def test_coverage_is_the_probability_that_codes_and_tail_name():
    logits = teacher_like(2, 60, 5, seed=8)
    encoding = Encoding(palette=6, tail=10)
    found, p = encode_maps(logits, encoding), logits.softmax(1).numpy()
    for i in range(2):
        named = [p[i, c][found.scores[i, k] > 0].sum() for k, c in enumerate(found.classes[i]) if c >= 0]
        named += [p[i, c].sum() for c in found.tail_classes[i] if c >= 0]
        assert found.coverage[i] == pytest.approx(sum(named) / 25, abs=1e-5)


def test_without_a_price_every_class_is_kept_to_half_a_step():
    logits = synthetic_logits(4, 30, 9, seed=1)
    maps = decoded(logits, Encoding(levels=MAX_LEVELS, threshold=0.0))
    error = np.abs(np.sqrt(maps.dense()) - logits.softmax(1).sqrt().numpy())
    # Half a step, one more where rounding would have tied the cell's first class, and the sum's own error.
    assert error.max() < 1.6 / MAX_LEVELS
    assert np.median(error) < 0.5 / MAX_LEVELS


def test_rounding_never_changes_the_first_class_of_a_cell_that_keeps_a_code():
    logits = synthetic_logits(8, 20, 18, seed=7)
    found = encode_maps(logits, Encoding(levels=6, threshold=0.0))
    coded = found.scores.max(1)
    first = np.take_along_axis(found.classes[:, :, None, None], found.scores.argmax(1)[:, None], 1)[:, 0]
    assert (coded > 0).mean() > 0.9
    assert ((found.scores == coded[:, None]).sum(1)[coded > 0] == 1).all()
    np.testing.assert_array_equal(first[coded > 0], logits.argmax(1).numpy()[coded > 0])


def test_what_rounding_ties_with_the_first_class_goes_down_a_step_and_from_the_last_step_to_none():
    """Three classes in five cells; the first class of every cell is class 1."""
    p = torch.tensor([0.3, 0.4, 0.3])[None, :, None, None].expand(1, 3, 1, 5)
    codes = torch.tensor([[1, 2, 0, 1, 5], [1, 2, 0, 0, 6], [1, 1, 0, 0, 6]])[None, :, None].float()
    expected = [[0, 1, 0, 1, 5], [1, 2, 0, 0, 6], [0, 1, 0, 0, 5]]
    assert keep_first(codes, p)[0, :, 0].tolist() == expected


def test_the_background_is_the_exact_left_over_of_each_cell():
    logits = synthetic_logits(2, 300, 6, seed=2)
    found = encode_maps(logits, Encoding(palette=8, tail=0, threshold=1e-5))
    table = code_table(20)
    p, background = logits.softmax(1).numpy(), np.exp(table[found.background].astype(np.float64))
    for i in range(2):
        coded = np.zeros((300, 6, 6), bool)
        coded[found.classes[i][found.classes[i] >= 0]] = found.scores[i][found.classes[i] >= 0] > 0
        left = np.where(coded, 0, p[i]).sum(0) / (~coded).sum(0)
        # Half a step of rounding, and up to a fifth of a nat towards the mean of the logs.
        assert (np.log(left / background[i]) > -0.126).all()
        assert (np.log(left / background[i]) < 0.126 + 0.2).all()


def test_a_tail_and_more_bytes_make_labels_truer():
    logits = teacher_like(4, 500, 7, seed=5)
    plain = Encoding(palette=16, tail=0)
    kl = [kl_of(logits, e).mean() for e in (plain, dataclasses.replace(plain, tail=64), Encoding(), QUALITIES["high"])]
    assert kl == sorted(kl, reverse=True)
    assert kl[1] < 0.97 * kl[0]


def test_labels_are_truer_than_five_float16_logits_per_cell():
    """The reference's files forget that other classes have any probability of their own."""
    logits = teacher_like(8, 500, 9, seed=2) + 1.0
    found = encode_maps(logits, Encoding())
    assert np.isfinite(found.reference_kl[[0]]).all()
    assert np.isnan(found.reference_kl[1:]).all()  # one in eight is compared
    assert found.reference_kl[0] == pytest.approx(float(reference_kl(logits)[0]), rel=1e-4)
    assert found.kl[0] < 0.7 * found.reference_kl[0]


@pytest.mark.parametrize(
    ("logits", "codes", "in_tail", "kl"),
    [
        (teacher_like(8, 60, 18, seed=4), 14168, 376, 0.02148),
        (2 * synthetic_logits(8, 60, 18, seed=5), 11433, 1, 0.00385),
    ],
    ids=["unsure", "sure"],
)
def test_the_same_maps_are_kept_as_they_have_been(logits, codes, in_tail, kl):
    """No law, but a change of these figures makes new stores larger or less true: it belongs in the change log."""
    found = encode_maps(logits, Encoding())
    assert (found.scores > 0).sum() == pytest.approx(codes, rel=3e-3)
    assert (found.tail_classes >= 0).sum() == pytest.approx(in_tail, abs=1)
    assert found.kl.mean() == pytest.approx(kl, rel=3e-3)


def test_the_named_qualities_are_those_that_were_measured():
    """The README's figures hold for these settings alone."""
    settings = {name: (e.palette, e.tail, e.levels, e.threshold, e.precision) for name, e in QUALITIES.items()}
    assert settings == {
        "low": (64, 192, 16, 0.006, "uint8"),
        "default": (64, 192, 20, 0.0021, "uint8"),
        "high": (128, 192, 28, 0.001, "uint8"),
    }


def test_a_class_that_would_save_nothing_takes_no_place():
    logits = torch.zeros(1, 9, 2, 2)
    assert (encode_maps(logits, Encoding()).classes == -1).all()
    assert (encode_maps(logits, Encoding()).tail_classes == -1).all()
    logits[:, 3, 0, 1] = 4.0
    found = encode_maps(logits, Encoding())
    place = found.classes[0].tolist().index(3)
    assert (found.scores[0, place] > 0).tolist() == [[False, True], [False, False]]
    assert found.kl[0] < 1e-2


def test_a_teacher_that_is_sure_or_says_nothing_gives_finite_labels():
    sure = torch.full((1, 1000, 3, 3), -200.0)
    sure[:, 4] = 200.0
    nothing = torch.zeros(1, 1000, 3, 3)
    for logits, entropy in ((sure, 0.0), (nothing, np.log(1000))):
        found = encode_maps(logits, Encoding())
        assert np.isfinite(found.kl).all()
        assert found.kl[0] == pytest.approx(0, abs=1e-4)
        assert found.entropy[0] == pytest.approx(entropy, abs=1e-3)
    assert encode_maps(sure, Encoding()).classes[0, 0] == 4


def test_images_do_not_influence_each_other():
    logits = teacher_like(5, 300, 6, seed=5)
    together, alone = encode_maps(logits, Encoding(palette=8)), encode_maps(logits[3:4], Encoding(palette=8))
    for name in ("classes", "scores", "background", "tail_classes", "tail_offsets"):
        np.testing.assert_array_equal(getattr(together, name)[3:4], getattr(alone, name))


def test_each_eighth_image_is_compared_with_five_float16_logits_per_cell():
    found = encode_maps(synthetic_logits(18, 10, 3, seed=2), Encoding()).reference_kl
    assert np.flatnonzero(np.isfinite(found)).tolist() == [0, 8, 16]


def test_many_classes_are_encoded_in_parts_and_give_the_same(monkeypatch):
    logits = teacher_like(5, 300, 6, seed=6)
    whole = encode_maps(logits, Encoding())
    monkeypatch.setattr("labeler.store.encoder.DENSE_ELEMENTS", 2 * logits[0].numel())
    parts = encode_maps(logits, Encoding())
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(parts, field.name))


def test_no_class_stands_twice_and_used_places_come_first():
    found = encode_maps(teacher_like(6, 200, 8, seed=9), Encoding(palette=20, tail=30))
    for classes, tail in zip(found.classes, found.tail_classes, strict=True):
        named = [c for c in (*classes, *tail) if c >= 0]
        assert len(named) == len(set(named))
        for ids in (classes, tail):
            used = ids[ids >= 0]
            assert (ids[: len(used)] == np.sort(used)).all()
            assert (ids[len(used) :] == -1).all()


def test_planes_of_format_1_are_coded_as_that_format_did():
    logits = synthetic_logits(3, 50, 8, seed=3)
    found = encode_planes(logits, 6, TINY_TABLE)
    log_p = logits.log_softmax(1)
    share = log_p.exp().mean((2, 3))
    np.testing.assert_array_equal(found.classes, share.argsort(1, descending=True)[:, :6].numpy())
    truth = np.take_along_axis(log_p.numpy(), found.classes[:, :, None, None], axis=1)
    assert np.abs(TINY_TABLE[found.scores] - truth)[truth > -19].max() < 0.16
    assert found.tail_classes.shape == (3, 0)


def test_the_code_table_rises_in_equal_steps_of_the_root_and_the_background_falls_in_quarters():
    table = code_table(20)
    assert table.shape == (256,)
    np.testing.assert_allclose(np.exp(table[1:21] / 2), np.arange(1, 21) / 20, rtol=1e-6)
    np.testing.assert_allclose(table[21:102], -0.25 * np.arange(81))
    assert table[0] == FLOOR
    assert (table[102:] == FLOOR).all()
    assert code_table(MAX_LEVELS)[-1] == FLOOR


@pytest.mark.parametrize("wrong", [{"levels": 3}, {"levels": MAX_LEVELS + 1}, {"threshold": -0.1}, {"tail": -1}])
def test_impossible_encodings_are_refused(wrong):
    with pytest.raises(InputError):
        Encoding(**wrong)


def test_dense_planes_keep_the_first_class_of_a_cell_where_its_code_is_shared():
    """Class 2 is first in the left cell by less than a step; class 0 stands before it in the palette."""
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, 0, 0] = torch.tensor([3.0, 6.0])
    logits[0, 2, 0] = torch.tensor([3.001, 0.0])
    found = encode_planes(logits, 3, TINY_TABLE)
    assert found.classes[0, 0] == 0
    named = found.classes[0][TINY_TABLE[found.scores[0]].argmax(0)]
    assert named[0].tolist() == [2, 0]
