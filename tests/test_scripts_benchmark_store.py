"""What the store promises about size, truth and speed, measured by its own benchmark on fewer images."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch

from labeler.store.score_code import Encoding
from scripts.benchmark.inputs.synthetic_maps import FORMAT_1, Setting, synthetic_logits
from scripts.benchmark.measure import Options
from scripts.benchmark.studies import store_real
from scripts.benchmark.studies.store_truth import CODES, LOAD, RAM, RIVAL, SETTINGS, measure_level, read_speed


def test_the_store_is_smaller_truer_and_faster_than_one_file_per_image(tmp_path):
    level, ours = measure_level(300, 6.0, tmp_path, SETTINGS[:1]), str(SETTINGS[0])
    assert 0.35 < level.sure < 0.5, "the maps are neither trivial nor noise"
    assert level.bytes[RIVAL] > 7_500
    assert level.bytes[ours] <= 2_200
    assert level.kl[ours] <= 0.70 * level.kl[RIVAL]
    assert level.top1[ours] >= 0.99
    times = read_speed(tmp_path, 300, rows=300, rounds=3).values
    assert statistics.median(times[LOAD]) >= 5 * statistics.median(times[CODES])
    assert statistics.median(times[LOAD]) >= 2 * statistics.median(times[RAM])


@pytest.fixture(scope="module")
def maps() -> torch.Tensor:
    """Not a teacher's, but of as many classes."""
    return synthetic_logits(4, torch.Generator().manual_seed(0), 6.0)


def test_maps_read_back_are_scored_on_cells_and_tokens(tmp_path, maps):
    truth = store_real.Truth(maps)
    assert truth.shares(maps.log_softmax(1)) == pytest.approx((0, 0), abs=1e-5)
    assert truth.shares(store_real.rival_log_p(maps)) == pytest.approx((1, 1))
    default = store_real.measure_setting(Setting(), truth, tmp_path / "default")
    fine = store_real.measure_setting(Setting("fine", Encoding(levels=32, threshold=1e-5)), truth, tmp_path / "fine")
    assert 0 < fine.cells < default.cells < 1
    assert 0 < fine.tokens < default.tokens < 1
    assert default.row < fine.row
    assert default.row < default.files


def test_a_store_of_format_1_can_be_measured_beside(tmp_path, maps):
    found = store_real.measure_setting(FORMAT_1, store_real.Truth(maps), tmp_path / "old")
    assert 0 < found.cells < 1


def test_without_photographs_or_weights_the_real_maps_are_left_out(tmp_path):
    options = Options("cpu", True, tmp_path, tmp_path, 2)
    assert "photographs" in store_real.run(options).left_out[store_real.NAME]
    found = store_real.run(dataclasses.replace(options, drawn=False, teacher="no_such_package.module:teacher"))
    assert not found.cases
    assert "no_such_package.module:teacher" in found.left_out[store_real.NAME]


def test_real_maps_give_cases_and_a_curve_with_the_prototypes_points(tmp_path):
    found = {str(s): store_real.Found(700, 900, 0.5, 0.6, 0.7) for s in (Setting(), FORMAT_1)}
    curve = store_real.size_curves(found, "at 448 px", 14)
    assert curve.marks["in cells, prototype"][0] == (1457, 0.67)
    assert "in cells, prototype" not in store_real.size_curves(found, "at 260 px", 9).marks
    cases = store_real.size_cases(found, store_real.Found(8000, 8000, 1, 1, 1), "at 448 px", "2 photographs")
    assert [case.ours for case in cases] == [str(Setting())] * 5
